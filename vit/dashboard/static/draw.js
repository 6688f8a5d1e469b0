// Maps as pixels: one pixel a patch, which the style sheet then enlarges.

import {AMOUNTS, DIFFERENCES, cssColour} from "./colours.js";

export function drawMap(canvas, map, [rows, columns]) {
  if (canvas.width !== columns) canvas.width = columns;
  if (canvas.height !== rows) canvas.height = rows;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(columns, rows);
  const pixels = new Uint32Array(picture.data.buffer);
  const table = map.signed ? DIFFERENCES : AMOUNTS;
  const [base, factor] = map.signed ? [127.5, 127.5 / map.top] : [0, 255 / map.top];
  for (let i = 0; i < pixels.length; i++) pixels[i] = table[Math.round(base + factor * map.values[i])];
  context.putImageData(picture, 0, 0);
}

export function clearMap(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

// The colours from least to most as a CSS gradient.
export function gradient(signed) {
  const table = signed ? DIFFERENCES : AMOUNTS;
  return `linear-gradient(to right, ${Array.from({length: 18}, (_, i) => cssColour(table, 15 * i)).join(", ")})`;
}
