// Thumbnails of every layer and head: what the readout looks at there.  A click shows one large, as raw attention.

import {amounts} from "./maps.js";
import {drawMap} from "./draw.js";
import {element} from "./dom.js";
import {rowOf, shares} from "./unpack.js";

export function headGrid(actions) {
  const grid = element("div", {class: "heads", role: "group", "aria-label": "Layers and heads", onkeydown: moved});
  const root = element("section", {class: "head-section"},
    element("h3", {text: "Every layer and head"}),
    element("p", {class: "note", text: "What each head attends to by itself, first layer on the left. Pick one to see it large."}),
    grid);
  let cells = [], size = "", layers = 0, heads = 0, drawn = null, focus = 0;

  function build(info) {
    [layers, heads] = [info.layers, info.heads];
    cells = [];
    grid.style.setProperty("--layers", layers);
    grid.replaceChildren(element("span"));
    for (let l = 0; l < layers; l++) grid.append(element("span", {class: "axis", text: String(l + 1)}));
    for (let h = 0; h < heads; h++) {
      grid.append(element("span", {class: "axis", text: heads > 1 ? `head ${h + 1}` : ""}));
      for (let l = 0; l < layers; l++) {
        const canvas = element("canvas", {"aria-hidden": "true"});
        const button = element("button", {
          type: "button", tabindex: "-1", title: `Layer ${l + 1}, head ${h + 1}`,
          "aria-label": `Layer ${l + 1}, head ${h + 1}`,
          onclick: () => actions.choose({method: "raw", layer: l, head: h}),
          onfocus: () => setFocus(h * layers + l),
        }, canvas);
        canvas.style.aspectRatio = `${info.image[1]} / ${info.image[0]}`;
        cells.push({button, canvas});
        grid.append(button);
      }
    }
    setFocus(0);
  }

  // one stop for the tab key; arrow keys go on from there
  function setFocus(index) {
    if (cells[focus]) cells[focus].button.tabIndex = -1;
    cells[focus = index].button.tabIndex = 0;
  }

  function moved(event) {
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -layers, ArrowDown: layers}[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    cells[focus + step]?.button.focus();
  }

  return {root, update({info, record}, state) {
    const wanted = [info.layers, info.heads, ...info.image].join();
    if (wanted !== size) {
      size = wanted;
      drawn = null;
      build(info);
    }
    const last = state.layer ?? layers - 1;
    cells.forEach(({button}, i) => {
      const here = state.method === "raw" && i % layers === last
        && (state.head === null || state.head === Math.floor(i / layers));
      button.setAttribute("aria-pressed", String(here));
    });
    if (drawn === record) return;
    drawn = record;
    for (let l = 0; l < layers; l++) {
      for (let h = 0; h < heads; h++) {
        drawMap(cells[h * layers + l].canvas, amounts(shares(rowOf(record.rows, l * heads + h))), info.grid);
      }
    }
  }};
}
