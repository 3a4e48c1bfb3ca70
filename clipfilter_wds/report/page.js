// The threshold, and all that follows it.

const box = element("threshold-number"), reset = element("reset"), logScale = element("log");
const dragSteps = data.is_cosine ? 10 : 1;
const chart = scoresChart((threshold) => choose(Math.round(threshold * data.steps / dragSteps) * dragSteps / data.steps));
let current = data.threshold;

function drawScores() {
  chart.draw(current, logScale.checked);
}

function drawReasons() {
  const kept = numKept(current);
  const rows = [["kept", kept], ["below_threshold", numScored - kept], ...Object.entries(data.unusable)];
  const longest = Math.max(...rows.map(([, number]) => number), 1);
  element("reasons").replaceChildren(...rows.map(([reason, number]) => {
    const bar = make("div", reason === "kept" ? "bar kept" : "bar");
    bar.style.width = `${100 * number / longest}%`;
    const name = make("th", "", reason);
    name.scope = "row";
    return make("tr", "", name, make("td", "", count(number)), make("td", "", percent(number, data.seen)), make("td", "bars", bar));
  }));
}

function drawAll() {
  const kept = numKept(current);
  element("kept").textContent = count(kept);
  element("share").textContent = percent(kept, data.seen);
  element("below").textContent = count(numScored - kept);
  element("band").textContent = data.band
    ? `${count(numWithin(current, data.band))} scores lie within the precision band of ±${data.band} around the threshold.` : "";
  reset.disabled = current === data.threshold;
  drawScores();
  drawReasons();
  drawGallery(current);
}

let waiting = false;

function choose(threshold, from) {
  if (!Number.isFinite(threshold)) return;
  const rounded = Math.round(Math.min(Math.max(threshold, least), most) * data.steps) / data.steps;
  current = threshold === data.threshold ? threshold : rounded;
  if (from !== box) box.value = shown(current);
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawAll();
  });
}

// Keys of a slider, as WAI-ARIA's authoring practices have them.
chart.handle.addEventListener("keydown", (event) => {
  const step = dragSteps / data.steps;
  const to = {
    ArrowLeft: current - step, ArrowDown: current - step, ArrowRight: current + step, ArrowUp: current + step,
    PageDown: current - 10 * step, PageUp: current + 10 * step, Home: least, End: most,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(to);
});

// --- the shards' table ---

const FEW_SHARDS = 10;
let shardOrder = "outlier", descends = true, allShards = false;

const shardValues = {
  name: (shard) => shard.name, seen: (shard) => shard.seen, unusable: (shard) => shard.seen - shard.scored,
  kept: (shard) => shard.kept, rate: (shard) => shard.seen ? shard.kept / shard.seen : -1, median: (shard) => shard.median ?? -Infinity,
  outlier: (shard) => shard.outlier,
};

function drawShardTable() {
  const value = shardValues[shardOrder], sign = descends ? -1 : 1;
  const compared = (one, other) => one === other ? 0 : one < other ? -sign : sign;
  const sorted = [...data.shards.points].sort((one, other) => compared(value(one), value(other)));
  element("shard-lines").replaceChildren(...sorted.slice(0, allShards ? sorted.length : FEW_SHARDS).map((shard) => {
    const name = make("th", "", shard.name + (shard.torn ? " (torn)" : ""), ...(shard.outlier ? [" ", make("span", "mark", "outlier")] : []));
    name.scope = "row";
    const cells = [count(shard.seen), count(shard.seen - shard.scored), count(shard.kept), percent(shard.kept, shard.seen), shard.median?.toFixed(digits) ?? ""];
    return make("tr", "", name, ...cells.map((text) => make("td", "", text)));
  }));
  for (const button of document.querySelectorAll("[data-order]")) {
    const own = button.dataset.order === shardOrder;
    button.closest("th").setAttribute("aria-sort", own ? (descends ? "descending" : "ascending") : "none");
  }
  element("more-shards").hidden = sorted.length <= FEW_SHARDS;
  element("more-shards").textContent = allShards ? "Show fewer" : `Show all ${count(sorted.length)}`;
}

for (const button of document.querySelectorAll("[data-order]")) {
  button.addEventListener("click", () => {
    descends = button.dataset.order === shardOrder ? !descends : button.dataset.order !== "name";
    shardOrder = button.dataset.order;
    drawShardTable();
  });
}
element("more-shards").addEventListener("click", () => {
  allShards = !allShards;
  drawShardTable();
});

// --- the rest ---

box.min = least;
box.max = most;
box.step = 1 / data.steps;
box.value = shown(current);
box.addEventListener("input", () => choose(box.valueAsNumber, box));
box.addEventListener("change", () => (box.value = shown(current)));  // what is beyond the ends, or no number, is not taken
reset.textContent = `Back to ${shown(data.threshold)}`;
reset.addEventListener("click", () => choose(data.threshold));
logScale.addEventListener("change", drawScores);
element("more").addEventListener("click", () => {
  numShown = numShown === FEW ? MANY : FEW;
  element("more").textContent = numShown === FEW ? "Show more of each" : "Show fewer";
  drawGallery(current);
});
element("save").addEventListener("click", saveKeys);
element("outcome-filter").addEventListener("change", () => drawGallery(current));
element("text-filter").addEventListener("input", () => drawGallery(current));

fillFilter();
drawAll();
drawTokens();
drawShards();
drawShardTable();
new ResizeObserver(drawScores).observe(element("scores"));
