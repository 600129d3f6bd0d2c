// The page of maps: points on a canvas, what they are coloured by, and the way from a point to its slide. The choices
// are in the address, behind the #, so that a map can be loaded again and shared.
import { $, element, fail, get, json, option, skip } from "./state.js";

const CLASSES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31", "#f0e442", "#5b6070"];
const UNKNOWN = "#9096a5", NAMED = 10;
let index = null, map = null, data = null, points = null, paint = [], chosen = -1, over = -1;
const CHOICES = ["points", "method", "colour", "group"];
const view = { x: 0, y: 0, scale: 1 };

function columns(buffer) {  // as viewer/maps.py lays them
  const n = map.tiles, made = {};
  ["slide", "tile", "x", "y", "cluster"].forEach((name, k) => { made[name] = new Int32Array(buffer, 4 * n * k, n); });
  let k = 5;
  for (const method of map.methods.tiles) {
    made[method] = [new Float32Array(buffer, 4 * n * k, n), new Float32Array(buffer, 4 * n * (k + 1), n)];
    k += 2;
  }
  if (map.attention) made.attention = new Float32Array(buffer, 4 * n * k, n);
  return made;
}

function values() {  // {kind, of: value of point i}
  const name = $("colour").value, tiles = $("points").value === "tiles";
  if (name === "cluster") return { kind: "classes", of: (i) => String(data.cluster[i]) };
  if (name === "slide") return { kind: "classes", of: (i) => map.slides[data.slide[i]].id };
  if (name === "attention") return { kind: "rank", of: (i) => (Number.isNaN(data.attention[i]) ? null : data.attention[i]) };
  const k = map.colours.findIndex((c) => `by ${c.name}` === name), c = map.colours[k];
  return { kind: c.kind, of: tiles ? (i) => c.values[data.slide[i]] : (i) => map.patients[i].by[k] };
}

// The part of an even palette that stands out from the page: its ends are nearly black and nearly white.
function seen(stops) {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("--dark").trim() === "1";
  return dark ? stops.slice(4) : stops.slice(0, -3);
}

function colours() {
  const { kind, of } = values(), n = points.n, key = $("key");
  key.replaceChildren();
  if (kind === "classes") {
    const often = new Map();
    for (let i = 0; i < n; i++) { const v = of(i); if (v !== null) often.set(v, (often.get(v) || 0) + 1); }
    const kept = [...often].sort((a, b) => b[1] - a[1]).slice(0, NAMED).map((e) => e[0]).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const colour = new Map(kept.map((v, k) => [v, CLASSES[k]]));
    paint = Array.from({ length: n }, (_, i) => colour.get(of(i)) || UNKNOWN);
    const line = (name, c) => { const row = element("div"), dot = element("i"); dot.style.background = c; row.append(dot, name); key.append(row); };
    kept.forEach((v) => line(`${v} (${often.get(v)})`, colour.get(v)));
    const rest = paint.filter((c) => c === UNKNOWN).length;
    if (rest) line(`others, unknown (${rest})`, UNKNOWN);
    return;
  }
  const known = [];
  for (let i = 0; i < n; i++) if (of(i) !== null) known.push(of(i));
  const low = kind === "rank" ? 0 : known.reduce((a, b) => Math.min(a, b), Infinity), high = kind === "rank" ? 1 : known.reduce((a, b) => Math.max(a, b), -Infinity);
  const stops = seen(index.palettes[index.even]), share = (v) => (high > low ? (v - low) / (high - low) : 0.5);
  paint = Array.from({ length: n }, (_, i) => { const v = of(i); return v === null ? UNKNOWN : stops[Math.round(share(v) * (stops.length - 1))]; });
  const bar = element("div", "colours"), ticks = element("div", "ticks");
  bar.style.background = `linear-gradient(to right, ${stops.join(",")})`;
  const of_ = $("colour").value === "attention" ? "of its slide" : "of its training";
  const ends = kind === "rank" ? [`lowest ${of_}`, "highest"] : [String(low), String(high)];
  ends.forEach((text) => ticks.append(element("span", "", text)));
  key.append(bar, ticks);
}

function choosePoints() {
  const method = $("method").value;
  if ($("points").value === "tiles") points = { n: map.tiles, xs: data[method][0], ys: data[method][1] };
  else points = { n: map.patients.length, xs: map.patients.map((p) => p.at[method][0]), ys: map.patients.map((p) => p.at[method][1]) };
  chosen = over = -1;
  told(-1);
}

function fit() {
  const box = $("plane").getBoundingClientRect();
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (let i = 0; i < points.n; i++) {
    x0 = Math.min(x0, points.xs[i]); x1 = Math.max(x1, points.xs[i]);
    y0 = Math.min(y0, points.ys[i]); y1 = Math.max(y1, points.ys[i]);
  }
  view.scale = 0.9 * Math.min(box.width / (x1 - x0 || 1), box.height / (y1 - y0 || 1));
  view.x = (x0 + x1) / 2;
  view.y = (y0 + y1) / 2;
  draw();
}

const place = (i, box) => [box.width / 2 + (points.xs[i] - view.x) * view.scale, box.height / 2 - (points.ys[i] - view.y) * view.scale];

let due = 0;
function draw() { if (!due) due = requestAnimationFrame(() => { due = 0; drawNow(); }); }

function drawNow() {
  if (!points) return;
  const box = $("plane").getBoundingClientRect(), ratio = window.devicePixelRatio || 1, canvas = $("dots");
  canvas.width = box.width * ratio;
  canvas.height = box.height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const size = $("points").value === "patients" ? 8 : points.n > 20000 ? 2 : points.n > 3000 ? 3 : 5, step = 7919 % points.n || 1;
  for (let k = 0, i = 0; k < points.n; k++, i = (i + step) % points.n) {  // not one class after the other
    const [x, y] = place(step > 1 && points.n % 7919 ? i : k, box);
    if (x < -9 || y < -9 || x > box.width + 9 || y > box.height + 9) continue;
    pen.fillStyle = paint[step > 1 && points.n % 7919 ? i : k];
    pen.fillRect(x - size / 2, y - size / 2, size, size);
  }
  for (const i of [over, chosen]) {
    if (i < 0) continue;
    const [x, y] = place(i, box);
    for (const [colour, width] of [["#fff", 5], ["#111", 2.5]]) { pen.strokeStyle = colour; pen.lineWidth = width; pen.strokeRect(x - 7, y - 7, 14, 14); }
  }
  $("plane").dataset.drawn = points.n;
}

function nearest(x, y, most) {
  const box = $("plane").getBoundingClientRect();
  let best = -1, least = most * most;
  for (let i = 0; i < points.n; i++) {
    const [px, py] = place(i, box), d = (px - x) ** 2 + (py - y) ** 2;
    if (d < least) { least = d; best = i; }
  }
  return best;
}

function address(slide, x, y) {
  const made = new URLSearchParams({ slide });
  if (map.run) made.set("run", map.run);
  if (x !== undefined) { made.set("x", x); made.set("y", y); made.set("um", 1); }
  return `/#${made}`;
}

function pointOf(i) {
  if ($("points").value === "patients") { const p = map.patients[i], at = map.slides.find((s) => s.id === p.slide); return { slide: p.slide, number: at.number, text: `patient ${p.id}`, href: address(p.slide) }; }
  const s = map.slides[data.slide[i]];
  return { slide: s.id, number: s.number, tile: data.tile[i], text: `tile ${data.tile[i]}, cluster ${data.cluster[i]}`, href: address(s.id, data.x[i], data.y[i]) };
}

function told(i) {
  const card = $("card");
  card.hidden = i < 0;
  if (i < 0) return;
  const p = pointOf(i), v = values().of(i);
  card.replaceChildren(element("span", "name", p.slide), element("span", "", p.text), element("span", "", `${$("colour").selectedOptions[0].textContent}: ${typeof v === "number" ? Number(v.toPrecision(3)) : v ?? "unknown"}`));
  if (p.number < 0) { card.append(element("span", "", "its slide is not in this work folder")); return; }
  const link = element("a", "", "open its slide here");
  link.href = p.href;
  card.append(link);
  if (p.tile !== undefined && i === chosen) { const picture = element("img"); picture.alt = ""; picture.src = `/crop/${p.number}/${p.tile}.jpg`; card.append(picture); }
}

function choose(i) { chosen = i; told(i); draw(); }
function open(i) { if (i >= 0 && pointOf(i).number >= 0) location.assign(pointOf(i).href); }
function zoom(k, x, y) {  // about a place of the plane, px
  const box = $("plane").getBoundingClientRect(), dx = x - box.width / 2, dy = box.height / 2 - y;
  view.x += dx / view.scale * (1 - 1 / k);
  view.y += dy / view.scale * (1 - 1 / k);
  view.scale *= k;
  draw();
}

function gallery() {
  const groups = [...new Set(map.prototypes.map((p) => `${p.of} ${p.name}`))];
  $("group").replaceChildren();
  groups.forEach((g) => option($("group"), g, g));
  $("gallery").hidden = !groups.length;
  crops();
}

function crops() {
  const rows = map.prototypes.filter((p) => `${p.of} ${p.name}` === $("group").value).map((p) => {
    const item = element("li"), link = element("a"), picture = element("img");
    link.href = address(p.slide, p.x_l0, p.y_l0);
    picture.alt = `tile ${p.tile} of ${p.slide}`;
    if (p.number >= 0) picture.src = `/crop/${p.number}/${p.tile}.jpg`;
    link.append(picture, element("span", "", `${p.patient}, cluster ${p.cluster}`));
    item.append(link);
    return item;
  });
  $("crops").replaceChildren(...rows);
}

function fill(id, names) {
  const before = $(id).value;
  $(id).replaceChildren();
  names.forEach((n) => option($(id), n, n.replace(/^by /, "")));
  if (names.includes(before)) $(id).value = before;
}

function controls() {
  const tiles = $("points").value === "tiles";
  fill("method", [...map.methods[$("points").value]].reverse());
  const own = tiles ? ["cluster", "slide", ...(map.attention ? ["attention"] : [])] : [], by = map.colours.map((c) => `by ${c.name}`);
  fill("colour", [...own, ...by]);
}

function again() { controls(); choosePoints(); colours(); fit(); remember(); }

const asked = () => new URLSearchParams(location.hash.slice(1));

function pick(id, value) { if (value !== null && [...$(id).options].some((o) => o.value === value)) $(id).value = value; }

function remember() {
  const made = new URLSearchParams({ map: map.name });
  for (const id of CHOICES) if ($(id).value) made.set(id, $(id).value);
  history.replaceState(null, "", `#${made}`);
}

async function load() {
  const k = Number($("maps").value), wanted = asked();
  map = await json(`/api/map/${k}`);
  $("note").textContent = map.told;  // what was left out of it
  data = columns(await (await get(`/points/${k}.bin`)).arrayBuffer());
  if (!map.colours.length) map.colours.push({ name: "nothing", kind: "classes", values: map.slides.map(() => null) });
  map.patients.forEach((p) => { if (!p.by.length) p.by.push(null); });
  gallery();
  pick("points", wanted.get("points"));
  controls();
  for (const id of ["method", "colour", "group"]) pick(id, wanted.get(id));
  crops();
  again();
}

function start() {
  const plane = $("plane"), touches = new Map();
  let moved = 0;
  const at = (event) => { const box = plane.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  plane.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.25 : 0.8, ...at(event)); }, { passive: false });
  plane.addEventListener("pointerdown", (event) => { if (event.target.closest("a")) return; plane.setPointerCapture(event.pointerId); touches.set(event.pointerId, at(event)); moved = 0; });
  plane.addEventListener("pointermove", (event) => {
    const before = touches.get(event.pointerId), now = at(event);
    if (!before) { over = nearest(...now, 12); told(over >= 0 ? over : chosen); draw(); return; }
    const other = [...touches].find(([id]) => id !== event.pointerId);
    moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    touches.set(event.pointerId, now);
    if (other) { const o = other[1]; zoom(Math.hypot(now[0] - o[0], now[1] - o[1]) / (Math.hypot(before[0] - o[0], before[1] - o[1]) || 1), (now[0] + o[0]) / 2, (now[1] + o[1]) / 2); return; }
    view.x -= (now[0] - before[0]) / view.scale;
    view.y += (now[1] - before[1]) / view.scale;
    draw();
  });
  const up = (event) => { if (touches.delete(event.pointerId) && moved < 5) choose(nearest(...at(event), 16)); };
  plane.addEventListener("pointerup", up);
  plane.addEventListener("pointercancel", (event) => touches.delete(event.pointerId));
  plane.addEventListener("dblclick", () => open(chosen));
  plane.addEventListener("keydown", (event) => {
    if (event.target !== plane) return;
    const box = plane.getBoundingClientRect(), by = 60 / view.scale, middle = [box.width / 2, box.height / 2];
    const act = {
      ArrowLeft: () => { view.x -= by; draw(); }, ArrowRight: () => { view.x += by; draw(); },
      ArrowUp: () => { view.y += by; draw(); }, ArrowDown: () => { view.y -= by; draw(); },
      "+": () => zoom(1.25, ...middle), "-": () => zoom(0.8, ...middle), 0: fit, Enter: () => open(chosen),
      " ": () => choose(nearest(...middle, Infinity)),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  $("maps").addEventListener("change", () => load().catch((error) => fail(error.message)));
  $("points").addEventListener("change", again);
  $("method").addEventListener("change", () => { choosePoints(); fit(); remember(); });
  $("colour").addEventListener("change", () => { colours(); told(chosen); draw(); remember(); });
  $("group").addEventListener("change", () => { crops(); remember(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours(); draw(); });
  window.addEventListener("hashchange", () => { if (asked().has("map")) fromAddress(); });
  skip("plane");
  $("fit").addEventListener("click", fit);
  new ResizeObserver(draw).observe(plane);
}

function fromAddress() {
  const k = index.maps.indexOf(asked().get("map"));
  if (k >= 0) $("maps").value = String(k);
  return load().catch((error) => fail(error.message));
}

async function main() {
  let theme = "auto";
  try { theme = localStorage.getItem("viewer-theme") || "auto"; } catch { /* it keeps nothing */ }
  if (["light", "dark"].includes(theme)) document.documentElement.dataset.theme = theme;
  index = await json("/api/index");
  if (!index.maps.length) { fail("there is no map: `pipeline map` makes one"); return; }
  index.maps.forEach((name, k) => option($("maps"), k, name));
  start();
  await fromAddress();
}

main().catch((error) => fail(error.message));
