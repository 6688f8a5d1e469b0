// Beside the map: where the patch under the cursor looks, and who looks at it, in one layer.

import {pairsOf} from "./maps.js";
import {choice, element, setText, show} from "./dom.js";
import {patchPicture} from "./mapview.js";
import {grouped, patchWords} from "./words.js";

export function patchPanel(actions) {
  const where = element("p", {class: "where", "aria-live": "polite"});
  const from = patchPicture("Where this patch looks");
  const to = patchPicture("Who looks at it");
  const pictures = element("div", {class: "pictures"}, from.root, to.root);
  const layer = choice("Layer", (value) => actions.choose({layer: value === "" ? null : Number(value)}));
  const head = choice("Head", (value) => actions.choose({head: value === "" ? null : Number(value)}));
  const note = element("p", {class: "note"});
  const choices = element("div", {class: "row"}, layer.root, head.root);
  const root = element("section", {class: "patch-panel"},
    element("h3", {text: "At the cursor"}), where, pictures, choices, note);

  return {root, update(moment, state, map, index, pairs) {
    const {info, image} = moment;
    setText(where, map ? patchWords(map, index, info) : "");
    const record = pairs?.record;
    show(pictures, Boolean(record));
    show(choices, Boolean(record));
    if (!record) {
      setText(note, pairs?.error ? `What patches look at cannot be shown: ${pairs.error}`
        : pairs ? "Fetching what the patches look at…" : "This run logged no attention between patches.");
      return;
    }
    const maps = pairsOf(record, info, state, index);
    from.update(image, info, maps.from, state, index);
    to.update(image, info, maps.to, state, index);
    layer.update(layerOptions(info), state.layer === null ? "" : String(maps.layer));
    head.update(record.per_head ? headOptions(info) : [["", "mean of all"]], maps.head === null ? "" : String(maps.head));
    setText(note, record.step === moment.step ? ""
      : `These two are of step ${grouped(record.step)}: not every step keeps them.`);
  }};
}

export function layerOptions(info) {
  const last = info.layers - 1;
  return [["", `${info.layers} (last)`],
    ...Array.from({length: last}, (_, i) => [String(last - 1 - i), String(last - i)])];
}

export function headOptions(info) {
  return [["", "all"], ...Array.from({length: info.heads}, (_, i) => [String(i), String(i + 1)])];
}
