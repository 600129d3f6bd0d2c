// One slide: its geometry, the places of its tiles, and the numbers of its layers, which are fetched when first needed.
import { $, json, get, emit, runOf, state, versioned } from "./state.js";

async function bytes(address) { return (await get(address)).arrayBuffer(); }

// Corners of n tiles from steps between them (viewer/numbers.py), in level-0 px: xs and ys.
export function placesOf(buffer) {
  const steps = new Int32Array(buffer), n = steps.length / 2, xs = new Float64Array(n), ys = new Float64Array(n);
  let x = 0, y = 0;
  for (let k = 0; k < n; k++) {
    xs[k] = x += steps[k];
    ys[k] = y += steps[n + k];
  }
  return [xs, ys];
}

// Float32 whose bytes come sorted by place (viewer/numbers.py).
export function valuesOf(buffer) {
  const from = new Uint8Array(buffer), n = from.length / 4, to = new Uint8Array(from.length);
  for (let k = 0; k < n; k++) for (let b = 0; b < 4; b++) to[4 * k + b] = from[b * n + k];
  return new Float32Array(to.buffer);
}

export async function load(number) {
  const [about, places] = await Promise.all([
    json(versioned(`/api/slide/${number}`)), bytes(versioned(`/places/${number}.bin`)),
  ]);
  const [sx, sy] = about.stretch;  // 1, 1 unless the slide's pixels are oblong: all below is px of the picture
  const [xs, ys] = placesOf(places);
  const slide = { ...about, number, x_l0: xs, y_l0: ys, n: xs.length, kept: new Map(), pending: new Map() };
  slide.xs = sx === 1 ? xs : xs.map((x) => x * sx);
  slide.ys = sy === 1 ? ys : ys.map((y) => y * sy);
  slide.tile = [about.tile_l0[0] * sx, about.tile_l0[1] * sy];
  slide.bounds = about.bounds.map((v, k) => v * (k % 2 ? sy : sx));
  slide.layer = about.layer_l0 * sx;
  sort(slide);
  return slide;
}

// Tiles by the cell of a grid as wide as a tile: heads and chains in two flat arrays.
function sort(slide) {
  const [w, h] = slide.tile;
  slide.columns = Math.ceil(slide.width / w) + 2;
  slide.rows = Math.ceil(slide.height / h) + 2;
  slide.heads = new Int32Array(slide.columns * slide.rows).fill(-1);
  slide.next = new Int32Array(slide.n);
  for (let k = slide.n - 1; k >= 0; k--) {
    const cell = cellOf(slide, Math.floor(slide.xs[k] / w), Math.floor(slide.ys[k] / h));
    slide.next[k] = slide.heads[cell];
    slide.heads[cell] = k;
  }
}

function cellOf(slide, column, row) {
  const c = Math.min(Math.max(column + 1, 0), slide.columns - 1), r = Math.min(Math.max(row + 1, 0), slide.rows - 1);
  return r * slide.columns + c;
}

// Every tile that may touch the rectangle, px of the picture.
export function tilesIn(slide, left, top, right, bottom, act) {
  const [w, h] = slide.tile;
  const c0 = Math.max(-1, Math.floor(left / w) - 1), c1 = Math.min(slide.columns - 2, Math.floor(right / w));
  const r0 = Math.max(-1, Math.floor(top / h) - 1), r1 = Math.min(slide.rows - 2, Math.floor(bottom / h));
  for (let r = r0; r <= r1; r++) {
    for (let c = c0; c <= c1; c++) for (let k = slide.heads[cellOf(slide, c, r)]; k >= 0; k = slide.next[k]) act(k);
  }
}

export function tileAt(slide, x, y) {
  const [w, h] = slide.tile;
  let found = -1;
  tilesIn(slide, x, y, x, y, (k) => {
    const inside = x >= slide.xs[k] && x < slide.xs[k] + w && y >= slide.ys[k] && y < slide.ys[k] + h;
    if (inside && (found < 0 || k < found)) found = k;
  });
  return found;
}

export function layersOf(run) {
  const found = state.slide && state.slide.runs.find((r) => r.run === run);
  return found ? found.layers : [];
}

export function layerOf(pane) {  // the chosen layer as this pane's run has it, or null
  const run = runOf(pane), layers = layersOf(run), at = layers.findIndex((l) => l.name === $("layer").value);
  return at < 0 ? null : { at, run, ...layers[at] };
}

// A layer's numbers if they are here; otherwise they are fetched, and "values" is told when they come.
export function values(run, at) {
  const here = state.slide.kept.get(`${run}/${at}`);
  if (!here) fetchValues(state.slide, run, at).catch(() => {});
  return here;
}

export function fetchValues(slide, run, at) {
  const key = `${run}/${at}`;
  if (!slide.pending.has(key)) {
    const coming = bytes(versioned(`/values/${run}/${at}/${slide.number}.bin`)).then((buffer) => {
      const found = valuesOf(buffer);
      slide.kept.set(key, found);
      if (slide === state.slide) emit("values");
      return found;
    });
    coming.catch(() => slide.pending.delete(key));
    slide.pending.set(key, coming);
  }
  return slide.pending.get(key);
}

// What is known of the tiles and drawn as an outline, where a run was held against it: rings as one path, px of the
// picture; and how well its maps point at it. Null where there is nothing.
export async function fetchTruth(slide, run) {
  const found = slide.runs.find((r) => r.run === run);
  if (!found || !found.truth) return null;
  const told = await json(versioned(`/truth/${run}/${slide.number}`)), path = new Path2D(), [sx, sy] = slide.stretch;
  for (const ring of told.rings) {
    for (let k = 0; k < ring.length; k += 2) path[k ? "lineTo" : "moveTo"](ring[k] * sx, ring[k + 1] * sy);
    path.closePath();
  }
  return { ...told, path };
}

export function colours(layer) {  // of the chosen palette; automatic: even, or pale in the middle for signed layers
  const chosen = $("palette").value;
  return chosen === "auto" ? (layer && layer.signed ? state.index.diverging : state.index.even) : chosen;
}
