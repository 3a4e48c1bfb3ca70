"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en-US");
const digits = Math.max(Math.round(Math.log10(data.steps)), 1);
const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(1) : "0.0") + "%";

// --- counting: the tables' own counts, at steps of 1 / data.steps ---

const unusable = Object.values(data.unusable).reduce((sum, number) => sum + number, 0);
const numScored = data.seen - unusable;

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

// --- charts ---

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const config = { displayModeBar: false, responsive: true };

/** plotly reads a few tags in texts; names from outside are shown as they are. */
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

function draw(id, description, traces, layout) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), fixedrange: true, automargin: true };
  Plotly.react(element(id), traces, {
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    hoverlabel: { bgcolor: colour("--sheet"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
    margin: { l: 10, r: 10, t: 10, b: 10 },
    dragmode: false,
    bargap: 0.06,
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  }, config);
  element(id).setAttribute("aria-label", description);
}

const MAX_BARS = 70;
const barSteps = [10, 20, 50, 100, 200, 500, 1000]
  .find((steps) => (data.highest - data.lowest) * data.steps / steps <= MAX_BARS) || 2000;

function drawScores(threshold) {
  const kept = [], dropped = [], middles = [], ranges = [];
  const begin = Math.floor(data.lowest * data.steps / barSteps) * barSteps;
  const boundary = firstStepKept(threshold);
  const withinStep = numKept(threshold) - atLeast(boundary);  // kept between a threshold and the step above it
  for (let low = begin; low <= data.highest * data.steps; low += barSteps) {
    const high = low + barSteps, above = atLeast(high);
    const holdsCut = low <= threshold * data.steps && threshold * data.steps < high;
    const keptHere = atLeast(Math.min(Math.max(low, boundary), high)) - above + (holdsCut ? withinStep : 0);
    kept.push(keptHere);
    dropped.push(atLeast(low) - above - keptHere);
    middles.push((low + barSteps / 2) / data.steps);
    ranges.push(`${low / data.steps} to ${high / data.steps}`);
  }
  const bars = (name, y, token) => ({
    type: "bar", name, x: middles, y, width: barSteps / data.steps * 0.94, customdata: ranges,
    marker: { color: colour(token) }, hovertemplate: `%{y:,} ${name}<br>%{customdata}<extra></extra>`,
  });
  const line = { type: "line", x0: threshold, x1: threshold, yref: "paper", y0: 0, y1: 1, line: { color: colour("--ink"), width: 2, dash: "dot" } };
  const around = { type: "rect", x0: threshold - data.band, x1: threshold + data.band, yref: "paper", y0: 0, y1: 1, line: { width: 0 }, fillcolor: colour("--faint"), opacity: 0.25 };
  draw("scores",
    `Histogram of ${count(numScored)} scores from ${data.lowest.toFixed(digits - 1)} to ${data.highest.toFixed(digits - 1)}; ` +
    `${count(numKept(threshold))} are at or above the threshold of ${threshold}.`,
    [bars("dropped", dropped, "--dropped"), bars("kept", kept, "--kept")],
    {
      barmode: "stack", shapes: data.band ? [around, line] : [line],
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" },
      xaxis: { title: { text: data.kind }, zeroline: false }, yaxis: { title: { text: "samples" } },
    });
}

function drawReasons(threshold) {
  const rows = [["below_threshold", numScored - numKept(threshold)], ...Object.entries(data.unusable)].reverse();
  draw("reasons",
    "Dropped samples by reason: " + rows.map(([reason, number]) => `${reason} ${count(number)}`).reverse().join(", ") + ".",
    [{
      type: "bar", orientation: "h", y: rows.map(([reason]) => reason), x: rows.map(([, number]) => number),
      marker: { color: colour("--dropped") }, text: rows.map(([, number]) => count(number)), textposition: "auto",
      cliponaxis: false, hovertemplate: "%{y}: %{x:,}<extra></extra>",
    }],
    { xaxis: { title: { text: "samples" }, rangemode: "tozero" }, yaxis: { type: "category", showgrid: false }, bargap: 0.35 });
}

function drawTokens() {
  const { counts, max_tokens: limit, truncated } = data.tokens;
  const longest = counts.length - 1, last = counts.findLastIndex((number) => number > 0);
  const lengths = counts.map((_, length) => length).slice(0, Math.min(Math.max(last, 8), longest) + 1);
  const names = lengths.map((length) => length === longest ? `${longest} or more` : String(length));
  const line = { type: "line", x0: limit + 0.5, x1: limit + 0.5, yref: "paper", y0: 0, y1: 1, line: { color: colour("--ink"), width: 2, dash: "dot" } };
  draw("tokens",
    `Histogram of caption lengths in tokens; ${count(truncated)} captions are longer than the ${limit} tokens that the text tower takes.`,
    [{
      type: "bar", x: lengths, y: counts.slice(0, lengths.length), customdata: names, width: 0.94,
      marker: { color: lengths.map((length) => colour(length > limit ? "--dropped" : "--kept")) },
      hovertemplate: "%{y:,} captions of %{customdata} tokens<extra></extra>",
    }],
    { shapes: last > limit ? [line] : [], xaxis: { title: { text: "tokens, start and end included" }, zeroline: false }, yaxis: { title: { text: "captions" } } });
  element("truncated").textContent = truncated
    ? `${count(truncated)} captions (${percent(truncated, numScored)}) are longer than the ${limit} tokens that the text tower takes and were truncated.`
    : `No caption is longer than the ${limit} tokens that the text tower takes.`;
}

function drawShards() {
  const points = (name, wanted, token, symbol, size) => {
    const chosen = data.shards.points.filter((point) => point.outlier === wanted && point.seen);
    return {
      type: "scatter", mode: "markers", name, x: chosen.map((point) => point.number),
      y: chosen.map((point) => point.kept / point.seen), text: chosen.map((point) => plain(point.name)),
      customdata: chosen.map((point) => [point.kept, point.seen]), marker: { color: colour(token), symbol, size },
      hovertemplate: "%{text}<br>%{y:.1%}: %{customdata[0]:,} of %{customdata[1]:,}<extra></extra>",
    };
  };
  const numOutliers = data.shards.points.filter((point) => point.outlier).length;
  draw("shards",
    `Share of samples kept in each of ${count(data.shards.total)} shards; ${count(numOutliers)} of those drawn stand out.`,
    [points("shard", false, "--kept", "circle", 7), points("outlier", true, "--dropped", "diamond", 11)],
    {
      showlegend: numOutliers > 0, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      xaxis: { title: { text: "shard" }, zeroline: false, tickformat: ",d", ...(data.shards.total < 8 ? { dtick: 1 } : {}) },
      yaxis: { title: { text: "kept" }, tickformat: ".0%", rangemode: "tozero" },
    });
}

// --- the gallery: texts from samples are only ever set as text ---

const FEW = 6, MANY = 36;
let numShown = FEW;

function make(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function makeCard(card) {
  const figure = make("figure", "card"), frame = make("div", "frame"), words = make("figcaption", "");
  if (card.image) {
    const image = make("img", "");
    image.alt = `Picture of sample ${card.key}`;
    image.src = card.image;
    frame.append(image);
  } else {
    frame.textContent = card.problem ? `No picture: ${card.problem}` : "No picture";
  }
  const caption = make("div", "caption", card.caption ?? "");
  caption.dir = "auto";
  const tokens = `${count(card.num_tokens)} tokens${card.truncated ? " (truncated)" : ""}`;
  words.append(make("div", "score"), caption, make("div", "origin", `${card.key} in ${card.shard}; ${tokens}; ${card.width} × ${card.height}`));
  figure.append(frame, words);
  return figure;
}

/** A function that shows some cards in a place and marks which are kept; each is made once. */
function gallery(id) {
  const made = new Map();
  return (cards, threshold) => {
    const figures = cards.map((card) => {
      if (!made.has(card)) made.set(card, makeCard(card));
      const figure = made.get(card), kept = passes(card.score, threshold);
      figure.classList.toggle("kept", kept);
      figure.querySelector(".score").textContent = `${card.score.toFixed(digits)} ${kept ? "kept" : "dropped"}`;
      return figure;
    });
    element(id).replaceChildren(...(figures.length ? figures : [make("p", "note", "None.")]));
  };
}

const [showBelow, showAbove, showLowest, showHighest] = ["below", "above", "lowest", "highest"].map((name) => gallery(`${name}-cards`));

function drawGallery(threshold) {
  const found = data.cards.findIndex((card) => passes(card.score, threshold));
  const boundary = found < 0 ? data.cards.length : found;
  showBelow(data.cards.slice(Math.max(0, boundary - numShown), boundary).reverse(), threshold);
  showAbove(data.cards.slice(boundary, boundary + numShown), threshold);
  showLowest(data.cards.slice(0, numShown), threshold);
  showHighest(data.cards.slice(-numShown).reverse(), threshold);
}

// --- the threshold ---

const least = data.is_cosine ? -1 : data.first_step / data.steps;
const most = data.is_cosine ? 1 : (data.first_step + data.at_least.length - 1) / data.steps;

const slider = element("threshold"), box = element("threshold-number"), reset = element("reset");
let current = data.threshold;

function drawAll() {
  const kept = numKept(current);
  element("kept").textContent = count(kept);
  element("share").textContent = percent(kept, data.seen);
  element("seen").textContent = count(data.seen);
  element("below").textContent = count(numScored - kept);
  element("band").textContent = data.band
    ? `${count(numWithin(current, data.band))} scores lie within the precision band of ±${data.band} around the threshold.` : "";
  reset.disabled = current === data.threshold;
  drawScores(current);
  drawReasons(current);
  drawGallery(current);
}

let waiting = false;

function choose(threshold, from) {
  if (!Number.isFinite(threshold)) return;
  current = threshold === data.threshold ? threshold : Math.round(Math.min(Math.max(threshold, least), most) * data.steps) / data.steps;
  if (from !== slider) slider.value = current;
  if (from !== box) box.value = current;
  slider.setAttribute("aria-valuetext", String(current));
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawAll();
  });
}

// Of cosines from 0, where all are kept, to a little more than the highest; of others, over all their steps.
if (data.is_cosine) {
  slider.max = Math.min(1, Math.ceil(Math.max(data.highest, data.threshold) * 50 + 1) / 50);
} else {
  slider.min = least;
  slider.max = most;
}
slider.step = data.is_cosine ? 10 / data.steps : 1 / data.steps;
box.min = data.is_cosine ? 0 : least;
box.max = most;
box.step = 1 / data.steps;
reset.textContent = `Back to ${data.threshold}`;
slider.addEventListener("input", () => choose(slider.valueAsNumber, slider));
box.addEventListener("input", () => choose(box.valueAsNumber, box));
element("more").hidden = data.cards.length <= FEW;
element("more").addEventListener("click", () => {
  numShown = numShown === FEW ? MANY : FEW;
  element("more").textContent = numShown === FEW ? "Show more of each" : "Show fewer";
  drawGallery(current);
});
reset.addEventListener("click", () => choose(data.threshold, reset));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawAll();
  drawTokens();
  drawShards();
});
choose(current, null);
drawTokens();
drawShards();
