// Keys, alive wherever the focus is, except in fields that take text.
import { $, panes } from "./state.js";
import { itemOf, magnify } from "./panes.js";
import { addCorner, closeRing, drawing, leave, toggleRegions, undo } from "./regions.js";

const POWERS = [1.25, 2.5, 5, 10, 20, 40];

function toggle(id) {
  $(id).checked = !$(id).checked;
  $(id).dispatchEvent(new Event("change"));
}

export function middle() {  // px of the picture in the middle of the left view
  const item = itemOf(panes[0]);
  return item && item.viewportToImageCoordinates(panes[0].viewer.viewport.getCenter(false));
}

export function startKeys(acts) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = event.target, text = at.matches("input[type=search], input:not([type]), textarea");
    if (event.key === "Escape") { if (!leave()) acts.back(); return; }
    if (text) return;
    const viewport = panes[0].viewer && itemOf(panes[0]) && panes[0].viewer.viewport;
    const arrows = !at.matches("select, input[type=range]");  // these have a use of their own for them
    const presses = !at.matches("button, a, select, summary, input");  // Enter is theirs
    const move = (x, y) => arrows && viewport && (() =>
      viewport.panBy(viewport.deltaPointsFromPixels(new OpenSeadragon.Point(x * 120, y * 120))));
    const act = {
      ...acts.keys,
      h: () => toggle("heat"), t: () => toggle("tissue"), g: () => toggle("grid"), o: () => toggle("truth"), s: () => toggle("two"), m: () => toggle("map"),
      r: () => toggleRegions(), "/": () => acts.search(),
      l: () => { const s = $("layer"); if (s.length) { s.selectedIndex = (s.selectedIndex + 1) % s.length; s.dispatchEvent(new Event("change")); } },
      0: () => viewport && viewport.goHome(), "+": () => viewport && viewport.zoomBy(1.5), "=": () => viewport && viewport.zoomBy(1.5),
      "-": () => viewport && viewport.zoomBy(1 / 1.5),
      ArrowLeft: move(-1, 0), ArrowRight: move(1, 0), ArrowUp: move(0, -1), ArrowDown: move(0, 1),
      ...Object.fromEntries(POWERS.map((power, k) => [k + 1, () => magnify(power)])),
      ...(drawing() === "polygon" ? {
        ",": () => { const p = middle(); if (p) addCorner(p.x, p.y); }, Backspace: undo, Enter: presses && closeRing,
      } : {}),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
}
