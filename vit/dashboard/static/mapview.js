// A picture with its map over it, and a cursor that goes from patch to patch.

import {drawMap, clearMap} from "./draw.js";
import {element, setText, show} from "./dom.js";

const MOVES = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};

// The image below, the map above it: {root, update}.  `image` is a probe's {png}, info the run's.
export function picture(properties = {}) {
  const photo = element("img", {alt: "", draggable: "false"});
  const canvas = element("canvas", {"aria-hidden": "true"});
  const root = element("div", {class: "picture", ...properties}, photo, canvas);
  let shown = null;
  return {root, canvas, update(image, info, map, look, opacity) {
    if (shown !== image.png) {
      shown = image.png;
      photo.src = `data:image/png;base64,${image.png}`;
    }
    root.style.aspectRatio = `${info.image[1]} / ${info.image[0]}`;
    root.classList.toggle("small", Math.max(...info.image) <= 128);
    photo.style.visibility = look === "map" && map ? "hidden" : "visible";
    canvas.style.opacity = look === "image" ? 0 : look === "map" ? 1 : opacity;
    if (map) drawMap(canvas, map, info.grid);
    else clearMap(canvas);
  }};
}

function placeOn(cursor, index, [rows, columns]) {
  cursor.style.left = `${100 * (index % columns) / columns}%`;
  cursor.style.top = `${100 * Math.floor(index / columns) / rows}%`;
  cursor.style.width = `${100 / columns}%`;
  cursor.style.height = `${100 / rows}%`;
}

// A small picture that shows where the patch is as well.
export function patchPicture(caption) {
  const cursor = element("div", {class: "cursor"});
  const view = picture({role: "img", "aria-label": caption});
  view.root.append(cursor);
  const title = element("figcaption", {text: caption});
  const root = element("figure", {class: "small-map"}, title, view.root);
  return {root, update(image, info, map, state, index) {
    view.update(image, info, map, state.look === "image" ? "overlay" : state.look, state.opacity);
    placeOn(cursor, index, info.grid);
  }};
}

// The large map: hover, click, or move with the arrow keys.  `actions.hover(index | null, grid)` is for a look,
// `actions.pin(index | null, grid)` stays.
export function mainMap(actions) {
  const cursor = element("div", {class: "cursor"});
  const view = picture({
    class: "picture main", tabindex: "0", role: "application", "aria-roledescription": "attention map",
    onpointermove: (event) => { if (event.pointerType !== "touch") actions.hover(under(event), grid); },
    onpointerleave: () => actions.hover(null, grid),
    onclick: (event) => { const index = under(event); actions.pin(index === pinned ? null : index, grid); },
    onkeydown: moved,
  });
  view.root.append(cursor);
  let grid = [1, 1], at = 0, pinned = null;

  function under(event) {
    const box = view.root.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / box.height * grid[0]);
    const column = Math.floor((event.clientX - box.left) / box.width * grid[1]);
    return inside(row, 0) * grid[1] + inside(column, 1);
  }

  function inside(value, axis) {
    return Math.max(0, Math.min(grid[axis] - 1, value));
  }

  function moved(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const row = Math.floor(at / grid[1]), column = at % grid[1];
    if (event.key in MOVES) {
      const [down, right] = MOVES[event.key];
      actions.pin(inside(row + down, 0) * grid[1] + inside(column + right, 1), grid);
    } else if (event.key === "Home" || event.key === "End") {
      actions.pin(row * grid[1] + (event.key === "Home" ? 0 : grid[1] - 1), grid);
    } else if (event.key === "Escape") {
      actions.pin(null, grid);
    } else {
      return;
    }
    event.preventDefault();
  }

  return {root: view.root, update(image, info, map, state) {
    grid = info.grid;
    view.root.setAttribute("aria-label",
      `Attention map of ${grid[0]} by ${grid[1]} patches. The arrow keys move from patch to patch.`);
    view.update(image, info, map, state.look, state.opacity);
  }, point(index, chosen, stays) {
    [at, pinned] = [index, stays ? index : null];
    cursor.classList.toggle("chosen", chosen);
    placeOn(cursor, index, grid);
  }};
}

// What the colours stand for.
export function legend(gradient) {
  const bar = element("div", {class: "bar"});
  const ends = ["", "", ""].map((text) => element("span", {text}));
  const root = element("div", {class: "legend"}, bar, element("div", {class: "ends"}, ...ends));
  let signed = null;
  return {root, update(map, info) {
    show(root, Boolean(map));
    if (!map) return;
    if (signed !== map.signed) bar.style.background = gradient(signed = map.signed);
    const top = map.top >= 10 ? Math.round(map.top) : Number(map.top.toFixed(1));
    const texts = map.signed ? [`${Number.isInteger(info.asked) ? "asked for" : "true class"}, ${top}×`, "neither", `predicted class, ${top}×`]
      : ["0", "", `${top}× the average patch`];
    ends.forEach((end, i) => setText(end, texts[i]));
  }};
}
