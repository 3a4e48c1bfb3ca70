// The samples, with filters. Texts from samples are only ever set as text.

const FEW = 6, MANY = 36;
let numShown = FEW, shownCards = [];

function make(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const size = (card) => `${card.width} × ${card.height}`;
const tokens = (card) => `${plural(card.num_tokens, "token")}${card.truncated ? " (truncated)" : ""}`;
const outcome = (card, threshold) => card.reason ?? (passes(card.score, threshold) ? "kept" : "below_threshold");

function verdict(card, threshold) {
  return card.reason ?? `${card.score.toFixed(digits)} ${passes(card.score, threshold) ? "kept" : "dropped"}`;
}

function makeCard(card) {
  const frame = make("div", "frame");
  if (card.image) {
    const image = make("img");
    image.alt = `Picture of sample ${card.key}`;
    image.src = card.image;
    frame.append(image);
  } else {
    frame.textContent = card.problem ? `No picture: ${card.problem}` : "No picture";
  }
  const caption = make("div", "caption", card.caption ?? "");
  caption.dir = "auto";
  const facts = card.reason ? [] : [tokens(card), size(card)];
  const origin = make("div", "origin", [`${card.key} in ${card.shard}`, ...facts].join("; "));
  return make("figure", "card", frame, make("figcaption", "", make("div", "score"), caption, origin));
}

/** Without shards there is nothing to see of a sample but its numbers. */
function makeLine(card) {
  const facts = card.reason ? ["", ""] : [tokens(card), size(card)];
  const row = make("tr", "card", make("td", "score"), ...[card.key, card.shard, ...facts].map((text) => make("td", "", text)));
  return row;
}

const made = new Map();

function figureOf(card, threshold) {
  if (!made.has(card)) made.set(card, (data.has_shards ? makeCard : makeLine)(card));
  const figure = made.get(card);
  figure.classList.toggle("kept", outcome(card, threshold) === "kept");
  figure.querySelector(".score").textContent = verdict(card, threshold);
  return figure;
}

function place(name, cards, threshold) {
  element(`${name}-cards`).replaceChildren(...cards.map((card) => figureOf(card, threshold)));
  element(`${name}-group`).hidden = cards.length === 0;
}

/** Whether a card is one of those asked for. */
function chosen(card, threshold) {
  const wanted = element("outcome-filter").value, text = element("text-filter").value.trim().toLowerCase();
  const texts = [card.caption ?? "", card.key, card.shard];
  return (!wanted || outcome(card, threshold) === wanted) && (!text || texts.some((own) => own.toLowerCase().includes(text)));
}

/** Shows the samples next to the threshold first, then those of both ends that are not among them. */
function drawGallery(threshold) {
  const cards = data.cards.filter((card) => chosen(card, threshold));
  const found = cards.findIndex((card) => passes(card.score, threshold));
  const boundary = found < 0 ? cards.length : found;
  const below = cards.slice(0, boundary), above = cards.slice(boundary);
  const near = [below.slice(-numShown).reverse(), above.slice(0, numShown)];
  const lowest = below.slice(0, -numShown).slice(0, numShown), highest = above.slice(numShown).slice(-numShown).reverse();
  const unusable = data.unusable_cards.filter((card) => chosen(card, threshold));
  const groups = { below: near[0], above: near[1], lowest, highest, unusable: unusable.slice(0, numShown) };
  for (const [name, group] of Object.entries(groups)) place(name, group, threshold);
  shownCards = Object.values(groups).flat();
  element("none").hidden = shownCards.length > 0;
  const listable = shownCards.filter((card) => card.listable).length;
  element("save").textContent = `Save ${plural(listable, "key")}`;
  element("save").disabled = listable === 0;
  element("more").hidden = numShown === FEW && shownCards.length === cards.length + unusable.length;
}

/** A list for `rewrite --subset`. */
function saveKeys() {
  const keys = shownCards.filter((card) => card.listable).map((card) => card.key);
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([keys.join("\n") + "\n"], { type: "text/plain" }));
  link.download = "keys.txt";
  link.click();
  URL.revokeObjectURL(link.href);
}

function fillFilter() {
  const reasons = [...new Set(data.unusable_cards.map((card) => card.reason))];
  for (const reason of ["kept", "below_threshold", ...reasons]) element("outcome-filter").append(new Option(reason, reason));
}
