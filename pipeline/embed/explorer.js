"use strict";
// Shows the nearest of the item that was chosen. All data are in the page: ``explorer.py`` has computed them.
const data = JSON.parse(document.getElementById("data").textContent);
const near = document.getElementById("near");
const tiles = [...document.querySelectorAll(".item")];
const tileOf = new Map(tiles.map((tile) => [Number(tile.dataset.number), tile]));
const narrow = matchMedia("(max-width: 899px)");
const reduced = matchMedia("(prefers-reduced-motion: reduce)");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A card of an item: its picture, its player, its words; choosing it goes on from there.
function card(number, words, rank) {
  const tile = tileOf.get(number);
  const figure = element("figure");
  const image = tile.querySelector("img");
  if (image) figure.append(image.cloneNode());
  if (tile.dataset.sound) {
    const label = `Sound of ${data.items[number][1]}`;
    figure.append(element("audio", { controls: "", preload: "metadata", src: tile.dataset.sound, "aria-label": label }));
  }
  const caption = element("figcaption");
  if (rank) {
    const go = element("button", { type: "button", class: "go" }, element("b", {}, words), ` ${data.items[number][1]}`);
    go.addEventListener("click", () => choose(number, true));
    caption.append(go);
  } else {
    caption.append(words);
  }
  figure.append(caption);
  return figure;
}

function listOf(modality, found) {
  const wide = modality === "image" ? "" : modality === "text" ? " wide texts" : " wide";
  const list = element("ol", { class: `found${wide}` });
  found.forEach(([number, cosine], i) => {
    const item = element("li", {}, card(number, cosine.toFixed(2), i + 1));
    const picture = item.querySelector("img");
    if (picture) picture.addEventListener("click", () => choose(number, true));
    list.append(item);
  });
  return list;
}

function choose(number, scroll) {
  const [modality, name] = data.items[number];
  show(modality);
  for (const tile of tiles) tile.setAttribute("aria-pressed", String(Number(tile.dataset.number) === number));
  const query = element("ol", { class: modality === "image" ? "found" : "found wide" }, element("li", {}, card(number, name)));
  near.replaceChildren(element("h2", {}, "Nearest to"), query);
  for (const [other, plural] of data.modalities) {
    const found = data.nearest[number][other];
    if (found) near.append(element("h3", {}, plural[0].toUpperCase() + plural.slice(1)), listOf(other, found));
    else if (other !== modality) near.append(element("p", { class: "soft" }, `${plural}: no common space with these`));
  }
  history.replaceState(null, "", `#${number}`);
  near.scrollTop = 0;
  if (scroll) bringToView(near);
}

// Where the two parts of the page are one below the other, the one that is meant comes into view.
function bringToView(part) {
  if (narrow.matches) part.scrollIntoView({ behavior: reduced.matches ? "auto" : "smooth", block: "start" });
}

for (const tile of tiles) {
  tile.addEventListener("click", () => choose(Number(tile.dataset.number), true));
  tile.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const seen = tiles.filter((other) => !other.closest("section").hidden);
    const next = seen[seen.indexOf(tile) + step];
    if (next) next.focus();
    event.preventDefault();
  });
}

const buttons = [...document.querySelectorAll("nav button")];

function show(modality) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.show === modality));
  for (const section of document.querySelectorAll("#items section")) section.hidden = section.dataset.of !== modality;
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    show(button.dataset.show);
    bringToView(document.getElementById("items"));
  });
}

const asked = location.hash ? Number(location.hash.slice(1)) : NaN;
const first = tileOf.has(asked) ? asked : data.first;
show(data.items[first][0]);
choose(first, false);
