// Regions drawn on a slide: kept per slide while the page is open, saved as GeoJSON in the work folder, in px of level 0.
// Corner by corner (pointer, or the comma key at the middle of the view) or freehand.
import { $, disclose, element, emit, fail, json, on, panes, say, state, versioned } from "./state.js";

const kept = new Map();  // slide number -> { regions, file, changed, read: what the file holds is among them }
const COLOURS = { Tissue: "#0a8a3a", Exclude: "#c62828" };
const colourOf = (name) => COLOURS[name] || "#1f5fd0";
let mode = "", ring = [];  // how one draws now; corners of the ring that is not closed

const mine = () => kept.get(state.number);
const isOpen = () => !$("regions").hidden;

async function ready() {
  const number = state.number;
  if (!kept.has(number)) kept.set(number, { regions: [], file: "", changed: false, read: false });
  const own = kept.get(number);
  if (!own.read) {  // until then nothing is saved: it would take the place of what the file holds
    try {
      const found = await json(versioned(`/api/regions/${number}`));
      if (!own.read) own.regions.unshift(...found.regions);  // before what was drawn meanwhile
      Object.assign(own, { file: found.file, read: true });
    } catch (error) { fail(error.message); }
  }
  show();
}

function show() {
  const own = mine();
  if (!own) return;
  const rows = own.regions.map((region, k) => {
    const item = element("li"), name = element("input"), go = element("button", "", `region ${k + 1}`), away = element("button", "", "delete");
    item.style.borderLeftColor = colourOf(region.name);
    name.value = region.name;
    name.setAttribute("list", "classes");
    name.maxLength = 80;
    name.placeholder = "no class";
    name.setAttribute("aria-label", `class of region ${k + 1}`);
    name.addEventListener("change", () => { region.name = name.value.trim(); change(); });
    go.title = "go there";
    go.addEventListener("click", () => emit("look", boxOf(region.rings[0])));
    away.setAttribute("aria-label", `delete region ${k + 1}`);
    away.addEventListener("click", () => { own.regions.splice(k, 1); change(); ($("regionlist").querySelector("button") || $("polygon")).focus(); });
    item.append(go, name, away);
    return item;
  });
  $("regionlist").replaceChildren(...rows);
  $("polygon").setAttribute("aria-pressed", mode === "polygon");
  $("freehand").setAttribute("aria-pressed", mode === "freehand");
  $("corner").disabled = mode !== "polygon";
  $("close").disabled = ring.length < 3;
  $("undo").disabled = !ring.length;
  $("saveregions").disabled = !own.changed || !own.read || !state.index.writable;
  $("getregions").disabled = !own.regions.length;
  $("regionnote").textContent = (own.changed ? "not saved" : own.file || "none yet") +
    (state.index.writable ? "" : "; this viewer saves nothing (--no-token): download them");
  panes.forEach((p) => { p.element.querySelector(".cross").hidden = mode !== "polygon"; p.element.classList.toggle("drawing", Boolean(mode)); });
  emit("redraw");
}

function change() { mine().changed = true; show(); }

function boxOf(corners) {
  const xs = corners.map((p) => p[0]), ys = corners.map((p) => p[1]);
  const least = (v) => v.reduce((a, b) => Math.min(a, b)), most = (v) => v.reduce((a, b) => Math.max(a, b));
  return [least(xs), least(ys), most(xs), most(ys)];
}

function setMode(wanted) {
  mode = mode === wanted ? "" : wanted;
  ring = [];
  show();
}

export function addCorner(x, y) {  // px of the picture
  const [sx, sy] = state.slide.stretch;
  ring.push([Math.round(x / sx * 100) / 100, Math.round(y / sy * 100) / 100]);
  show();
}

export function closeRing() {
  if (ring.length >= 3) {
    mine().regions.push({ name: $("regionclass").value.trim(), rings: [ring] });
    ring = [];
    change();
    say(`region ${mine().regions.length} is drawn`);
  }
}

export const undo = () => { ring.pop(); show(); };
export const drawing = () => mode;

export function leave() {  // what Escape does here: the open ring, then the mode; whether it did anything
  if (ring.length) { ring = []; show(); return true; }
  if (mode) { setMode(mode); return true; }
  return false;
}

export function toggleRegions(open = !isOpen()) {
  if (!state.slide) return;
  if (!open && mode) setMode(mode);
  disclose($("drawbutton"), $("regions"), open);
  if (open) ready().then(() => { if (isOpen()) $("polygon").focus(); });  // not where the next key would be text
  else $("drawbutton").focus();
}

async function send(address) {
  const answer = await fetch(address, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ regions: mine().regions }),
  });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

async function save() {
  const own = mine(), sent = JSON.stringify(own.regions);
  try {
    const found = await (await send(`/api/regions/${state.number}`)).json();
    own.changed = JSON.stringify(own.regions) !== sent;
    own.file = found.file;
    say(found.file ? `saved: ${found.file}; tile with --regions ${found.folder}` : "saved: no region is left");
    fail("");
  } catch (error) { fail(error.message); }
  show();
}

async function download() {
  try {
    const text = await (await send(`/geojson/${state.number}`)).text();
    emit("download", { data: new Blob([text], { type: "application/geo+json" }), name: `${state.slide.id}.geojson` });
  } catch (error) { fail(error.message); }
}

export function drawRegions(draw, at, pane) {
  const own = mine();
  if (!own || !state.slide) return;
  const [sx, sy] = state.slide.stretch;
  const path = (corners) => corners.forEach(([x, y], k) => {
    draw[k ? "lineTo" : "moveTo"](at.x + x * sx * at.scale, at.y + y * sy * at.scale);
  });
  const outline = (colour) => {
    for (const [style, width] of [["#fff", 4.5], [colour, 2.5]]) { draw.strokeStyle = style; draw.lineWidth = width; draw.stroke(); }
  };
  for (const region of own.regions) {
    draw.beginPath();
    for (const one of region.rings) { path(one); draw.closePath(); }
    outline(colourOf(region.name));
  }
  if (!ring.length || pane.side) return;
  draw.beginPath();
  path(ring);
  outline(colourOf($("regionclass").value.trim()));
  draw.fillStyle = "#111";
  for (const [x, y] of ring) draw.fillRect(at.x + x * sx * at.scale - 3, at.y + y * sy * at.scale - 3, 6, 6);
}

export function startRegions(middle) {  // middle: px of the picture in the middle of the view
  $("drawbutton").addEventListener("click", () => toggleRegions());
  $("polygon").addEventListener("click", () => setMode("polygon"));
  $("freehand").addEventListener("click", () => setMode("freehand"));
  $("corner").addEventListener("click", () => { const p = middle(); if (p) addCorner(p.x, p.y); });
  $("close").addEventListener("click", closeRing);
  $("undo").addEventListener("click", undo);
  $("saveregions").addEventListener("click", save);
  $("getregions").addEventListener("click", download);
  $("regions").querySelector(".close").addEventListener("click", () => toggleRegions(false));
  on("tap", ({ pane, at }) => { if (mode === "polygon" && !pane.side) addCorner(at.x, at.y); });
  on("twice", ({ event }) => { if (mode === "polygon") { event.preventDefaultAction = true; ring.pop(); closeRing(); } });
  on("drag", ({ pane, at, event }) => {
    if (mode !== "freehand" || pane.side) return;
    event.preventDefaultAction = true;
    addCorner(at.x, at.y);
  });
  on("drop", ({ pane }) => { if (mode === "freehand" && !pane.side) { closeRing(); ring = []; show(); } });
  on("opened", () => { ring = []; if (isOpen()) ready(); else emit("redraw"); });
  window.addEventListener("beforeunload", (event) => { if ([...kept.values()].some((one) => one.changed)) event.preventDefault(); });
}
