"use strict";

// What the page was made of, and how many samples each threshold keeps: the tables' own counts, at steps of 1 / data.steps.

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en-US");
const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(1) : "0.0") + "%";
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** A score as a person writes it: 0.3, not 0.30000000000000004. */
const decimal = (number) => String(Number(number.toPrecision(10)));
const digits = Math.max(Math.round(Math.log10(data.steps)), 1);

/** A threshold as it is shown: a run's cut has more digits than a person wants. */
const shown = (threshold) => decimal(Number(threshold.toFixed(digits + 2)));

const numUnusable = Object.values(data.unusable).reduce((sum, number) => sum + number, 0);
const numScored = data.seen - numUnusable;

/** How many scores are at least `step / data.steps`. */
function atLeast(step) {
  const index = step - data.first_step;
  if (index < 0) return data.at_least[0];
  return index < data.at_least.length ? data.at_least[index] : 0;
}

/** Whether this is where the run cut its scores: there raw cosines decide, and of equal ones maybe some only. */
const isCut = (threshold) => data.is_cut && threshold === data.threshold;

/** The least step that is not below the threshold. What is clipped to 0 passes a threshold of 0 or less. */
function firstStepKept(threshold) {
  return data.is_cosine && threshold <= 0 && !isCut(threshold) ? data.first_step : Math.ceil(threshold * data.steps - 1e-7);
}

function numKept(threshold) {
  return threshold === data.threshold ? data.kept : atLeast(firstStepKept(threshold));
}

function numWithin(threshold, band) {
  return atLeast(Math.floor((threshold - band) * data.steps)) - atLeast(Math.ceil((threshold + band) * data.steps) + 1);
}

const passes = (score, threshold) => isCut(threshold)
  ? data.cut !== null && score >= data.cut
  : (data.is_cosine ? Math.min(Math.max(score, 0), 1) : score) >= threshold;

// Thresholds to choose from: of cosines from 0, where all are kept, to a little more than the highest; of others, all steps.
const least = data.is_cosine ? Math.min(0, data.threshold) : data.first_step / data.steps;
const most = data.is_cosine
  ? Math.min(1, Math.ceil(Math.max(data.highest, data.threshold) * 50 + 1) / 50)
  : (data.first_step + data.at_least.length - 1) / data.steps;
