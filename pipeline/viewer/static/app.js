// The page of the viewer: starts its parts, opens slides, and wires the controls.
import { $, disclose, emit, entry, fail, json, on, option, panes, plain, say, sides, skip, state } from "./state.js";
import { load } from "./slide.js";
import { fillLabels, fillList, mark, neighbour, startList } from "./list.js";
import { apply, decorate, itemOf, magnify, minimap, relayer, retell, start, tell, view } from "./panes.js";
import { choose, copy, remember, startAddress } from "./address.js";
import { goToHighest, refill, startTiles, toggleTiles } from "./tiles.js";
import { startRegions, toggleRegions } from "./regions.js";
import { savePicture, startPicture } from "./picture.js";
import { middle, startKeys } from "./keys.js";

const narrow = window.matchMedia("(max-width: 820px)");

async function open(i) {
  const mine = ++state.asked;
  state.wanted = i;  // keys may come faster than slides
  fail("");
  let slide;
  try {
    slide = await load(i);
  } catch (error) {
    if (mine === state.asked) fail(error.message);
    return;
  }
  if (mine !== state.asked) return;
  state.slide = slide;
  state.number = i;
  const one = entry(i);
  $("title").textContent = [one.id, one.patient && `patient ${one.patient}`, one.label].filter(Boolean).join(" · ");
  $("title").title = $("title").textContent;
  document.title = one.id;
  fillLayers();
  mark();
  for (const pane of sides()) start(pane);
  emit("opened");
}

function fillLayers() {
  const before = $("layer").value || state.layer, names = new Set();
  state.slide.runs.forEach((r) => r.layers.forEach((l) => names.add(l.name)));
  $("layer").replaceChildren();
  names.forEach((n) => option($("layer"), n, plain(n)));
  if (names.has(state.layer)) $("layer").value = state.layer;
  else if (names.has(before)) $("layer").value = before;
  state.layer = "";
}

function chooseSlide(i) {
  if (i < 0) return;
  state.goal = null;
  side(false);
  open(i);
}

function sideBySide() {
  const two = $("two").checked;
  panes[1].element.hidden = $("run1label").hidden = !two;
  if (two && state.slide) {
    const at = view(panes[0]);
    state.goal = at;
    start(panes[1]);
  }
  requestAnimationFrame(() => panes.forEach((p) => p.viewer && p.viewer.forceResize()));
  remember();
}

function side(show) {  // the list, which lies over the slide on a narrow screen
  document.body.classList.toggle("list", show);
  $("menu").setAttribute("aria-expanded", show);
}

function theme(value) {
  if (value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
  $("theme").value = value;
  try { localStorage.setItem("viewer-theme", value); } catch { /* a browser that keeps nothing */ }
}

function otherTheme() {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("--dark").trim() === "1";
  theme(dark ? "light" : "dark");
}

async function fullScreen() {
  try {
    if (document.fullscreenElement) await document.exitFullscreen();
    else await document.documentElement.requestFullscreen();
  } catch { say("this browser allows no full screen here"); }
}

function help() { disclose($("help"), $("keys"), $("keys").hidden); }

function back() {  // what lies open closes, and the focus goes to the slide
  disclose($("help"), $("keys"), false);
  if (narrow.matches) { side(false); disclose($("more"), $("controls"), false); }
  if (!$("tiles").hidden) toggleTiles(false);
  if (!$("regions").hidden) toggleRegions(false);
  $("osd0").focus({ preventScroll: true });
}

function told(pane) {  // magnification, of the left view
  const at = pane.side ? null : view(pane);
  if (!at) return;
  const power = 10 / at.um;
  $("zoom").options[0].textContent = `${power < 10 ? power.toFixed(2) : power.toFixed(1)}×`;
  $("zoom").value = "";
  $("zoom").title = `${at.um.toPrecision(3)} µm per px of the screen; 10× is 1 µm per px`;
  remember();
}

function controls() {
  for (const id of ["heat", "tissue", "grid", "truth"]) $(id).addEventListener("change", apply);
  $("map").addEventListener("change", () => panes.forEach(minimap));
  $("opacity").addEventListener("input", apply);
  for (const id of ["layer", "scale", "palette", "run1"]) $(id).addEventListener("change", () => { relayer(); remember(); refill(); });
  $("run0").addEventListener("change", () => { fillList(); relayer(); remember(); refill(); });
  $("two").addEventListener("change", sideBySide);
  $("help").addEventListener("click", help);
  $("keys").querySelector(".close").addEventListener("click", () => { help(); $("help").focus(); });
  $("fit").addEventListener("click", () => itemOf(panes[0]) && panes[0].viewer.viewport.goHome());
  $("zoom").addEventListener("change", () => { if ($("zoom").value) magnify(Number($("zoom").value)); });
  $("link").addEventListener("click", copy);
  $("full").addEventListener("click", fullScreen);
  document.addEventListener("fullscreenchange", () => $("full").setAttribute("aria-pressed", Boolean(document.fullscreenElement)));
  $("theme").addEventListener("change", () => theme($("theme").value));
  $("menu").addEventListener("click", () => { side(!document.body.classList.contains("list")); if (document.body.classList.contains("list")) $("search").focus(); });
  $("more").addEventListener("click", () => disclose($("more"), $("controls"), $("controls").hidden));
  const fold = () => disclose($("more"), $("controls"), !narrow.matches);
  narrow.addEventListener("change", fold);
  fold();
  on("choose", chooseSlide);
  on("moved", told);
  on("values", retell);
  on("redraw", () => panes.forEach(decorate));
  on("look", ([left, top, right, bottom]) => {
    const [sx, sy] = state.slide.stretch, w = Math.max(right - left, 1), h = Math.max(bottom - top, 1);
    const box = itemOf(panes[0]).imageToViewportRectangle((left - w / 4) * sx, (top - h / 4) * sy, 1.5 * w * sx, 1.5 * h * sy);
    panes[0].viewer.viewport.fitBounds(box);
  });
  on("opened", () => tell(-1));
}

async function main() {
  let chosen = "auto";
  try { chosen = localStorage.getItem("viewer-theme") || "auto"; } catch { /* it keeps nothing */ }
  theme(["auto", "light", "dark"].includes(chosen) ? chosen : "auto");
  state.index = await json("/api/index");
  const { runs, palettes, even, diverging } = state.index;
  $("work").textContent = state.index.work;
  $("work").title = state.index.work;
  $("maplink").hidden = !state.index.maps.length;
  runs.forEach((r, k) => ["run0", "run1"].forEach((id) => option($(id), k, r.name)));
  if (runs.length > 1) $("run1").value = "1";
  option($("palette"), "auto", "automatic");
  for (const name of Object.keys(palettes).filter((n) => n !== "classic")) {
    option($("palette"), name, name + (name === even ? " (even)" : name === diverging ? " (for and against)" : ""));
  }
  option($("palette"), "classic", "classic (uneven)");
  fillLabels();
  startList();
  startTiles();
  startRegions(middle);
  startPicture();
  controls();
  skip("osd0");
  const first = choose();
  startAddress({ slide: open, again: () => { fillList(); relayer(); } });
  startKeys({
    back, search: () => { side(true); $("search").focus(); },
    keys: {
      n: () => chooseSlide(neighbour(1)), p: () => chooseSlide(neighbour(-1)), "?": help, x: goToHighest, v: () => toggleTiles(),
      e: savePicture, c: copy, f: fullScreen, d: otherTheme,
    },
  });
  fillList();
  if ($("two").checked) sideBySide();
  if (first >= 0) open(first);
  else {
    const lost = location.hash.includes("slide="), i = neighbour(1);
    if (i >= 0) open(i);
    if (lost) fail("the slide of this address is not in this work folder");
  }
}

main().catch((error) => fail(error.message));
