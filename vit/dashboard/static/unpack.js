// Packed arrays, as vit/dashboard/format.py writes them: value = (code / 255)^2 * peak, with one peak a row.
// A record is unpacked once, when something of it is shown first; rows are computed when they are asked for.

const SQUARES = Float32Array.from({length: 256}, (_, code) => (code / 255) ** 2);
const OPENED = new WeakMap();

// A packed array -> {shape, codes, peaks}.  Throws an Error for what is damaged.
export function opened(packed) {
  if (!packed || typeof packed !== "object") throw new Error("it has no such array");
  let found = OPENED.get(packed);
  if (!found) {
    const shape = packed.shape.map(Number);
    const codes = bytesOf(packed.codes);
    const peaks = new Float32Array(bytesOf(packed.peaks).buffer);
    const size = shape.reduce((a, b) => a * b, 1);
    if (codes.length !== size || peaks.length * shape.at(-1) !== size) throw new Error("an array has another size");
    OPENED.set(packed, found = {shape, codes, peaks});
  }
  return found;
}

export function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// Row `index` (of all rows, counted through the leading axes) as a Float32Array.
export function rowOf(packed, index) {
  const {shape, codes, peaks} = opened(packed);
  const width = shape.at(-1);
  if (index < 0 || index >= peaks.length) throw new Error("it has no such row");
  const row = new Float32Array(width);
  for (let i = 0, at = index * width; i < width; i++, at++) row[i] = SQUARES[codes[at]] * peaks[index];
  return row;
}

// Column `column` of the matrix whose first row is row `first`, as a Float32Array.
export function columnOf(packed, first, height, column) {
  const {shape, codes, peaks} = opened(packed);
  const width = shape.at(-1);
  const values = new Float32Array(height);
  for (let i = 0; i < height; i++) values[i] = SQUARES[codes[(first + i) * width + column]] * peaks[first + i];
  return values;
}

// Several rows of one length, put together entry by entry: "mean", "max" or "min".
export function fused(rows, fusion) {
  const result = rows[0].slice();
  for (const row of rows.slice(1)) {
    for (let i = 0; i < row.length; i++) {
      if (fusion === "max") result[i] = Math.max(result[i], row[i]);
      else if (fusion === "min") result[i] = Math.min(result[i], row[i]);
      else result[i] += row[i];
    }
  }
  if (fusion === "mean") for (let i = 0; i < result.length; i++) result[i] /= rows.length;
  return result;
}

export function sumOf(values) {
  let sum = 0;
  for (const value of values) sum += value;
  return sum;
}

// Shares that sum to 1; all zeros stay zeros.
export function shares(values) {
  const sum = sumOf(values);
  return sum > 0 ? values.map((value) => value / sum) : values;
}
