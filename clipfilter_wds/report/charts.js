// Charts as plain SVG. Colours are classes of the style sheet, so they follow the colour scheme by themselves.

/** An SVG element. */
function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A number as attributes have to have it: never 1e-13. */
const plain = (number) => String(number).includes("e") ? number.toFixed(20) : String(number);

const titled = (text, shape) => (shape.append(svg("title", {}, text)), shape);

/** Maps numbers from `low` to `high` to pixels; `of` undoes it. */
function scale(low, high, from, to) {
  const factor = (to - from) / (high - low || 1);
  return Object.assign((value) => from + (value - low) * factor, { of: (pixel) => low + (pixel - from) / factor });
}

/** Round numbers from `low` to `high`, about `wanted` of them. */
function roundNumbers(low, high, wanted) {
  const rough = (high - low || 1) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, number) => (first + number) * step);
}

const short = new Intl.NumberFormat("en-US", { notation: "compact" });

/** The scale of counts: from 0, evenly or by powers of ten. */
function countScale(highest, bottom, top, isLog) {
  if (!isLog) return { y: scale(0, highest || 1, bottom, top), ticks: roundNumbers(0, highest || 1, 4).filter(Number.isInteger) };
  const powers = Math.max(Math.ceil(Math.log10(highest || 1)), 1);
  const place = scale(0, powers + 0.3, bottom, top);  // a count of 1 is 0.3 high
  const ticks = Array.from({ length: powers + 1 }, (_, power) => 10 ** power).filter((_, power) => power % Math.ceil((powers + 1) / 6) === 0);
  return { y: (number) => number > 0 ? place(Math.log10(number) + 0.3) : bottom, ticks };
}

const LEFT = 48, RIGHT = 12;

function yAxis(y, ticks, right, format, title, top) {
  return [
    ...ticks.flatMap((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)),
    ]),
    svg("text", { class: "tick title", x: LEFT, y: top - 8 }, title),
  ];
}

function xAxis(x, ticks, bottom, format, title) {
  return [
    ...ticks.map((value) => svg("text", { class: "tick", x: x(value), y: bottom + 18, "text-anchor": "middle" }, format(value))),
    svg("text", { class: "tick title", x: (x(x.low) + x(x.high)) / 2, y: bottom + 36, "text-anchor": "middle" }, title),
  ];
}

/** An x scale that fills the chart's width. */
const across = (low, high, width) => Object.assign(scale(low, high, LEFT, width - RIGHT), { low, high });

/** Draws into a place now and whenever its width changes: `parts(width)` gives the SVG's content. */
function drawn(id, height, parts) {
  const place = element(id), root = svg("svg", { height, width: "100%", "aria-hidden": "true" });
  place.replaceChildren(root);
  const draw = () => place.clientWidth && root.replaceChildren(...parts(place.clientWidth));
  new ResizeObserver(draw).observe(place);
  draw();
}

// --- the histogram of scores, the line to drag, and what each threshold keeps ---

const TOP = 24, BOTTOM = 226, CURVE_TOP = 262, CURVE_BOTTOM = 340;

const axisLow = Math.min(data.lowest, least), axisHigh = Math.max(data.highest, most);

// At most 70 bars, none narrower than 1 in 300 of the axis, which goes further than scores that are all alike.
const barSteps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
  .find((steps) => (data.highest - data.lowest) * data.steps / steps <= 70 && (axisHigh - axisLow) * data.steps / steps <= 300) || 2000;

/** Per bar: its ends, and how many of its scores are kept and dropped. */
function scoreBars(threshold) {
  const bars = [], boundary = firstStepKept(threshold);
  const withinStep = numKept(threshold) - atLeast(boundary);  // kept between a threshold and the step above it
  for (let low = Math.floor(data.lowest * data.steps / barSteps) * barSteps; low <= data.highest * data.steps; low += barSteps) {
    const high = low + barSteps, above = atLeast(high);
    const holdsCut = low <= threshold * data.steps && threshold * data.steps < high;
    const kept = atLeast(Math.min(Math.max(low, boundary), high)) - above + (holdsCut ? withinStep : 0);
    bars.push({ low: low / data.steps, high: high / data.steps, kept, dropped: atLeast(low) - above - kept });
  }
  return bars;
}

function barShapes(bar, x, y, bottom) {
  const left = x(bar.low) + 0.5, width = Math.max(x(bar.high) - x(bar.low) - 1, 0.5), top = y(bar.kept + bar.dropped);
  const boundary = bottom - (bottom - top) * bar.kept / (bar.kept + bar.dropped || 1);
  return [["dropped", top, boundary], ["kept", boundary, bottom]].filter(([name]) => bar[name]).map(([name, from, to]) =>
    titled(`${count(bar[name])} ${name}, ${decimal(bar.low)} to ${decimal(bar.high)}`,
      svg("rect", { class: name, x: left, width, y: from, height: Math.max(to - from, 0.5), "data-count": bar[name] })));
}

/** The chart of scores. `draw(threshold, isLog)` draws it; `choose(threshold)` is called when the line is moved. */
function scoresChart(choose) {
  const place = element("scores"), plot = svg("g", { "aria-hidden": "true" });
  const handle = svg("g", { class: "handle", id: "threshold", role: "slider", tabindex: 0, "aria-label": "Threshold", "aria-valuemin": plain(least), "aria-valuemax": plain(most) },
    svg("rect", { class: "reach", x: -22, width: 44, y: 0, height: CURVE_BOTTOM }),
    svg("line", { y1: 8, y2: CURVE_BOTTOM }),
    svg("rect", { class: "grip", x: -8, width: 16, y: 8, height: 30, rx: 8 }),
    svg("path", { class: "arrows", d: "M-2.5 19l-3 4l3 4M2.5 19l3 4l-3 4" }));
  place.append(svg("svg", { width: "100%", height: CURVE_BOTTOM + 44 }, plot, handle));
  let x = across(axisLow, axisHigh, place.clientWidth);

  function draw(threshold, isLog) {
    const width = place.clientWidth, right = width - RIGHT, bars = scoreBars(threshold);
    x = across(axisLow, axisHigh, width);
    const { y, ticks } = countScale(Math.max(...bars.map((bar) => bar.kept + bar.dropped)), BOTTOM, TOP, isLog);
    const share = scale(0, 1, CURVE_BOTTOM, CURVE_TOP), points = [];
    for (let pixel = LEFT; pixel <= right; pixel += 2) points.push(`${pixel},${share(atLeast(firstStepKept(x.of(pixel))) / (data.seen || 1))}`);
    const [from, to] = [threshold - data.band, threshold + data.band].map((end) => Math.min(Math.max(x(end), LEFT), right));
    plot.replaceChildren(
      ...(data.band ? [svg("rect", { class: "band", x: from, width: to - from, y: TOP, height: CURVE_BOTTOM - TOP })] : []),
      ...yAxis(y, ticks, right, (value) => short.format(value), isLog ? "samples, log scale" : "samples", TOP),
      ...bars.flatMap((bar) => barShapes(bar, x, y, BOTTOM)),
      ...yAxis(share, [0, 0.5, 1], right, (value) => `${100 * value}%`, "kept at each threshold, of all samples", CURVE_TOP),
      svg("polyline", { class: "curve", points: points.join(" ") }),
      ...xAxis(x, roundNumbers(axisLow, axisHigh, Math.max(width / 110, 5)), CURVE_BOTTOM, decimal, data.kind),
      svg("circle", { class: "dot", r: 5, cx: x(threshold), cy: share(numKept(threshold) / (data.seen || 1)) }));
    handle.setAttribute("transform", `translate(${x(threshold)} 0)`);
    handle.setAttribute("aria-valuenow", plain(threshold));
    handle.setAttribute("aria-valuetext", shown(threshold));
    place.setAttribute("aria-label",
      `Histogram of ${count(numScored)} scores from ${data.lowest.toFixed(digits - 1)} to ${data.highest.toFixed(digits - 1)}; ` +
      `${count(numKept(threshold))} are at or above the threshold of ${shown(threshold)}.`);
  }

  const at = (event) => x.of(event.clientX - place.getBoundingClientRect().left);
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    handle.focus();
    event.preventDefault();
  });
  handle.addEventListener("pointermove", (event) => handle.hasPointerCapture(event.pointerId) && choose(at(event)));
  place.addEventListener("click", (event) => handle.contains(event.target) || choose(at(event)));
  return { draw, handle };
}

// --- lengths of captions, and shards ---

function drawTokens() {
  const { counts, max_tokens: limit, truncated } = data.tokens;
  const longest = counts.length - 1, last = counts.findLastIndex((number) => number > 0);
  const drawnCounts = counts.slice(0, Math.min(Math.max(last, 8), longest) + 1);
  const bottom = 200, top = 24;
  drawn("tokens", bottom + 44, (width) => {
    const x = across(-0.5, drawnCounts.length - 0.5, width), { y, ticks } = countScale(Math.max(...drawnCounts), bottom, top, false);
    const bar = (number, length) => titled(
      `${plural(number, "caption")} of ${length === longest ? `${longest} or more` : length} tokens`,
      svg("rect", { class: length > limit ? "dropped" : "kept", x: x(length - 0.47), width: x(0.94) - x(0), y: y(number), height: bottom - y(number) }));
    return [
      ...yAxis(y, ticks, width - RIGHT, (value) => short.format(value), "captions", top), ...drawnCounts.map(bar),
      ...(last > limit ? [svg("line", { class: "limit", x1: x(limit + 0.5), x2: x(limit + 0.5), y1: top, y2: bottom })] : []),
      ...xAxis(x, roundNumbers(0, drawnCounts.length - 1, Math.max(width / 90, 3)).filter(Number.isInteger), bottom, decimal, "tokens, start and end included"),
    ];
  });
  element("truncated").textContent = truncated
    ? `${plural(truncated, "caption")} (${percent(truncated, numScored)}) ${truncated === 1 ? "is" : "are"} longer than the ${limit} tokens that the text tower takes and ${truncated === 1 ? "was" : "were"} truncated.`
    : `No caption is longer than the ${limit} tokens that the text tower takes.`;
  element("tokens").setAttribute("aria-label", `Histogram of caption lengths in tokens. ${element("truncated").textContent}`);
}

function drawShards() {
  const points = data.shards.points.filter((point) => point.seen), far = points.filter((point) => point.outlier);
  const bottom = 200, top = 24, highest = Math.max(...points.map((point) => point.kept / point.seen), 0.01);
  const dot = (x, y) => (point) => {
    const at = [x(point.number), y(point.kept / point.seen)];
    const shape = point.outlier ? svg("path", { class: "outlier", d: `M${at[0]} ${at[1] - 7}l7 7l-7 7l-7 -7z` }) : svg("circle", { class: "shard", cx: at[0], cy: at[1], r: 3.5 });
    return titled(`${point.name}\n${percent(point.kept, point.seen)}: ${count(point.kept)} of ${count(point.seen)}`, shape);
  };
  drawn("shards", bottom + 44, (width) => {
    const x = across(-0.5, Math.max(data.shards.total, 1) - 0.5, width), y = scale(0, highest, bottom, top);
    return [
      ...yAxis(y, roundNumbers(0, highest, 4), width - RIGHT, (value) => `${decimal(100 * value)}%`, "kept", top),
      ...[...points].sort((one, other) => one.outlier - other.outlier).map(dot(x, y)),
      ...xAxis(x, roundNumbers(0, Math.max(data.shards.total - 1, 1), Math.max(width / 110, 3)).filter(Number.isInteger), bottom, count, "shard, in order of name"),
    ];
  });
  element("shards").setAttribute("aria-label",
    `Share of samples kept in each of ${count(data.shards.total)} shards; ${count(far.length)} of those drawn stand out.`);
}
