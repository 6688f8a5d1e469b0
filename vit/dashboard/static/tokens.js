// Where patches went in a model that reduces its tokens: which are on their own after a layer, which have become one.

import {choice, element, setText, show} from "./dom.js";
import {bytesOf} from "./unpack.js";

const FATES = new WeakMap();
const SCALE = 16; // pixels of the canvas for a patch
const LINES = [["rgba(0, 0, 0, 0.8)", 1], ["rgba(255, 255, 255, 0.9)", 0]]; // to be seen on any image

// "reduced" of a probe's record -> {gone, into}: after which layer a patch joined which patch in front of it.
function fatesOf(packed) {
  let found = FATES.get(packed);
  if (!found) {
    found = {gone: new Uint16Array(bytesOf(packed.gone).buffer), into: new Uint16Array(bytesOf(packed.into).buffer)};
    FATES.set(packed, found);
  }
  return found;
}

// Of each patch the first patch of the token that it is in after `layer`.
function tokensAfter(packed, layer) {
  const {gone, into} = fatesOf(packed);
  return Array.from(gone, (_, patch) => {
    let at = patch;
    while (gone[at] <= layer && into[at] < at) at = into[at];
    return at;
  });
}

// How many patches each token has.
function sizesOf(tokens) {
  const sizes = new Map();
  for (const each of tokens) sizes.set(each, (sizes.get(each) ?? 0) + 1);
  return sizes;
}

export function tokenPanel(actions) {
  const after = choice("After layer", (value) => actions.choose({after: value === "" ? null : Number(value)}));
  const photo = element("img", {alt: "", draggable: "false"});
  const canvas = element("canvas", {role: "img"});
  const picture = element("div", {class: "picture"}, photo, canvas);
  const sentence = element("p", {class: "note"});
  const root = element("section", {class: "token-section"},
    element("h3", {text: "Where patches went"}), sentence, element("div", {class: "row"}, after.root), picture);
  let shown = null, info = null, tokens = null, cursor = null;

  function draw() {
    const [rows, columns] = info.grid;
    canvas.width = columns * SCALE;
    canvas.height = rows * SCALE;
    const context = canvas.getContext("2d");
    const sizes = sizesOf(tokens);
    tokens.forEach((each, patch) => {
      if (sizes.get(each) === 1) return;
      const [x, y] = placeOf(patch, columns);
      // what was not kept is dark; what is one with the patch at the cursor is marked
      if (info.reduction === "keep") fill(context, "rgba(0, 0, 0, 0.75)", x, y);
      if (cursor !== null && each === tokens[cursor]) fill(context, "rgba(255, 160, 0, 0.45)", x, y);
    });
    context.lineWidth = 2;
    for (const [style, shift] of LINES) {
      context.strokeStyle = style;
      context.beginPath();
      tokens.forEach((each, patch) => {
        const [x, y] = placeOf(patch, columns).map((value) => value + shift);
        if (patch % columns && tokens[patch - 1] !== each) line(context, x, y, x, y + SCALE);
        if (patch >= columns && tokens[patch - columns] !== each) line(context, x, y, x + SCALE, y);
      });
      context.stroke();
    }
  }

  return {root, update(moment, state) {
    const packed = moment.info.reduction && moment.record.reduced;
    show(root, Boolean(packed));
    tokens = null;
    if (!packed) return;
    info = moment.info;
    const last = info.layers - 1, layer = Math.min(state.after ?? last, last);
    const lower = Array.from({length: last}, (_, i) => [String(last - 1 - i), String(last - i)]);
    after.update([["", `${info.layers} (last)`], ...lower], layer === last ? "" : String(layer));
    if (shown !== moment.image.png) photo.src = `data:image/png;base64,${shown = moment.image.png}`;
    picture.style.aspectRatio = `${info.image[1]} / ${info.image[0]}`;
    picture.classList.toggle("small", Math.max(...info.image) <= 128);
    tokens = tokensAfter(packed, layer);
    setText(sentence, words(tokens, info, layer));
    canvas.setAttribute("aria-label", sentence.textContent);
    draw();
  }, point(index) {
    if (cursor === index) return;
    cursor = index;
    if (tokens) draw();
  }};
}

function words(tokens, info, layer) {
  const sizes = [...sizesOf(tokens).values()];
  const alone = sizes.filter((size) => size === 1).length, largest = Math.max(...sizes);
  const where = `After layer ${layer + 1} of ${info.layers},`;
  if (alone === tokens.length) return `${where} each of the ${tokens.length} patches is still a token of its own.`;
  if (info.reduction === "keep") {
    return `${where} ${alone} of ${tokens.length} patches are kept; the other ${largest}, dark, have become one token.`;
  }
  return `${where} the ${tokens.length} patches have become ${sizes.length} tokens, ${alone} of them a single patch, the`
    + ` largest ${largest} patches. Patches with no line between them are one token; those that are one with the patch at`
    + " the cursor are marked.";
}

function placeOf(patch, columns) {
  return [patch % columns * SCALE, Math.floor(patch / columns) * SCALE];
}

function fill(context, style, x, y) {
  context.fillStyle = style;
  context.fillRect(x, y, SCALE, SCALE);
}

function line(context, x, y, toX, toY) {
  context.moveTo(x, y);
  context.lineTo(toX, toY);
}
