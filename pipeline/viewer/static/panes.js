// The deep-zoom panes: the slide, its layers, what is drawn above them, and the numbers of the tile under the pointer.
import { $, digits, emit, panes, plain, runOf, sides, state, versioned } from "./state.js";
import { colours, fetchTruth, layerOf, layersOf, tileAt, tilesIn, values } from "./slide.js";
import { legend, pointing, verdict } from "./legend.js";
import { drawRegions } from "./regions.js";

let following = false;

export const itemOf = (pane) => pane.viewer && pane.viewer.world.getItemCount() ? pane.viewer.world.getItemAt(0) : null;

function source() {
  const slide = state.slide, i = state.number;
  return {
    width: slide.width, height: slide.height, tileSize: slide.tileSize, tileOverlap: 0,
    minLevel: Math.ceil(Math.log2(slide.tileSize)) - 1,
    getTileUrl: (level, x, y) => versioned(`/tile/${i}/${level}/${x}_${y}.jpg`),
  };
}

export function start(pane) {
  pane.asked++;
  pane.heat = pane.tissue = pane.truth = null;
  pane.hover = -1;
  pane.readout.textContent = "";
  if (!pane.viewer) make(pane);
  pane.viewer.open(source());
}

function make(pane) {
  pane.viewer = OpenSeadragon({
    element: $(`osd${pane.side}`), showNavigationControl: false, tabIndex: -1, drawer: "canvas", animationTime: 0.4,
    maxZoomPixelRatio: 4, visibilityRatio: 0.5, imageSmoothingEnabled: true, preserveImageSizeOnResize: true,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, minZoomImageRatio: 0.6,
    gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true, pinchToZoom: true, flickEnabled: true },
    showNavigator: true, navigatorPosition: "TOP_RIGHT", navigatorSizeRatio: 0.18, navigatorAutoFade: false,
    navigatorDisplayRegionColor: "#d03030", navigatorMaintainSizeRatio: true,
  });
  pane.viewer.innerTracker.keyDownHandler = pane.viewer.innerTracker.keyHandler = null; // the page has its own keys
  for (const one of pane.viewer.navigator.element.querySelectorAll("[tabindex]")) one.tabIndex = -1;
  pane.viewer.navigator.element.tabIndex = -1;
  pane.viewer.navigator.innerTracker.keyDownHandler = pane.viewer.navigator.innerTracker.keyHandler = null;
  minimap(pane);
  for (const name of ["update-viewport", "resize", "open", "animation"]) pane.viewer.addHandler(name, () => decorate(pane));
  pane.viewer.addHandler("open", () => {
    if (state.goal) place(pane, state.goal);
    addLayers(pane);
    emit("moved", pane);
  });
  for (const name of ["zoom", "pan"]) pane.viewer.addHandler(name, () => { follow(pane); emit("moved", pane); });
  pane.viewer.addHandler("animation-finish", () => emit("moved", pane));
  pane.viewer.addHandler("canvas-click", (event) => {
    if (event.quick) { const at = pointOf(pane, event.position); emit("tap", { pane, at, event }); hoverAt(pane, at); }
  });
  pane.viewer.addHandler("canvas-double-click", (event) => emit("twice", { pane, event }));
  pane.viewer.addHandler("canvas-drag", (event) => emit("drag", { pane, at: pointOf(pane, event.position), event }));
  pane.viewer.addHandler("canvas-drag-end", () => emit("drop", { pane }));
  pane.element.addEventListener("mousemove", (event) => {
    if (!state.slide || !itemOf(pane)) return;
    const box = pane.canvas.getBoundingClientRect();
    hoverAt(pane, pointOf(pane, new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top)));
  });
  pane.element.addEventListener("mouseleave", () => tell(-1));
}

export const pointOf = (pane, position) => itemOf(pane).viewerElementToImageCoordinates(position);

export function minimap(pane) {
  if (pane.viewer) pane.viewer.navigator.element.style.display = $("map").checked ? "inline-block" : "none";
}

// µm of the slide in one CSS px of the screen, and the place in the middle, px of level 0.
export function view(pane) {
  const item = itemOf(pane);
  if (!item) return null;
  const middle = item.viewportToImageCoordinates(pane.viewer.viewport.getCenter(false));
  const um = state.slide.mpp / item.viewportToImageZoom(pane.viewer.viewport.getZoom(false));
  return { x: middle.x / state.slide.stretch[0], y: middle.y / state.slide.stretch[1], um };
}

export function place(pane, goal) {
  const item = itemOf(pane), [sx, sy] = state.slide.stretch;
  if (!item) return;
  const middle = item.imageToViewportCoordinates(new OpenSeadragon.Point(goal.x * sx, goal.y * sy));
  pane.viewer.viewport.zoomTo(item.imageToViewportZoom(state.slide.mpp / goal.um), null, true);
  pane.viewer.viewport.panTo(middle, true);
}

export function magnify(power) {  // 10x is 1 µm per px
  const pane = panes[0], item = itemOf(pane);
  if (item) pane.viewer.viewport.zoomTo(item.imageToViewportZoom(state.slide.mpp * power / 10));
}

function follow(pane) {
  if (following || !$("two").checked) return;
  following = true;
  const other = panes[1 - pane.side];
  if (itemOf(other) && itemOf(pane)) {
    other.viewer.viewport.zoomTo(pane.viewer.viewport.getZoom(), null, true);
    other.viewer.viewport.panTo(pane.viewer.viewport.getCenter(), true);
  }
  following = false;
}

export function addLayers(pane) {
  const mine = ++pane.asked, viewer = pane.viewer, slide = state.slide;  // an answer to an older question must not win
  for (const kind of ["heat", "tissue"]) if (pane[kind]) { viewer.world.removeItem(pane[kind]); pane[kind] = null; }
  const put = (kind, url, x, width) => viewer.addSimpleImage({
    url, x: x / slide.width, y: kind === "tissue" ? slide.bounds[1] / slide.width : 0, width: width / slide.width, opacity: 0,
    success: (event) => {
      if (mine !== pane.asked || pane[kind]) viewer.world.removeItem(event.item);
      else { pane[kind] = event.item; pane.element.dataset[kind] = "ready"; apply(); }
    },
  });
  pane.element.dataset.heat = pane.element.dataset.tissue = "loading";
  const layer = layerOf(pane);
  if (layer) {
    const how = `scale=${$("scale").value}&palette=${colours(layer)}`;
    put("heat", versioned(`/layer/${layer.run}/${layer.at}/${state.number}.png?${how}`), 0, slide.layer);
    values(layer.run, layer.at);
  }
  fetchTruth(slide, runOf(pane)).catch(() => null).then((found) => {
    if (mine !== pane.asked) return;
    pane.truth = found;
    $("truthlabel").hidden = !sides().some((p) => p.truth && p.truth.rings.length);
    pointing(pane);
    decorate(pane);
  });
  pane.element.querySelector(".lack").textContent = layer ? "" : lacking(runOf(pane));
  put("tissue", versioned(`/tissue/${state.number}.png`), slide.bounds[0], slide.bounds[2]);
  legend(pane, layer);
  verdict(pane);
  decorate(pane);
}

function lacking(k) {  // why a run shows no layer here
  const run = state.index.runs[k], own = state.slide.runs.find((r) => r.run === k), name = $("layer").value;
  if (!run) return "";
  if (own && own.why) return `${run.name} has no layers here: ${own.why}`;
  return name ? `${run.name} has no ${plain(name)} here` : "";
}

export const relayer = () => { for (const pane of sides()) if (itemOf(pane) && state.slide) addLayers(pane); };

export function apply() {
  for (const pane of panes) {
    if (pane.heat) pane.heat.setOpacity($("heat").checked ? $("opacity").value / 100 : 0);
    if (pane.tissue) pane.tissue.setOpacity($("tissue").checked ? 1 : 0);
    pane.element.querySelector(".colours").style.opacity = $("heat").checked ? 1 : 0.3;
    decorate(pane);
  }
}

// px of the picture to CSS px of the pane: x -> x0 + scale * x.
export function frameOf(pane) {
  const item = itemOf(pane), width = state.slide.width;
  const a = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
  const b = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(width, 0));
  return { x: a.x, y: a.y, scale: (b.x - a.x) / width };
}

// What lies on a pane but is no picture: tile edges, the hovered tile, regions, the scale bar.
export function decorate(pane) {
  const slide = state.slide;
  if (!pane.viewer || !slide || !itemOf(pane)) return;
  const box = pane.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  pane.canvas.width = box.width * ratio;
  pane.canvas.height = box.height * ratio;
  const draw = pane.canvas.getContext("2d");
  draw.scale(ratio, ratio);
  const at = frameOf(pane), { scale } = at, [w, h] = slide.tile;
  const rectangle = (k) => draw.strokeRect(at.x + slide.xs[k] * scale, at.y + slide.ys[k] * scale, w * scale, h * scale);
  if ($("grid").checked && w * scale > 3) {
    draw.strokeStyle = "rgba(20, 30, 120, .55)";
    draw.lineWidth = 1;
    const left = -at.x / scale, top = -at.y / scale;
    tilesIn(slide, left, top, left + box.width / scale, top + box.height / scale, rectangle);
  }
  if (pane.truth && $("truth").checked) drawTruth(draw, at, pane.truth.path);
  drawRegions(draw, at, pane);
  if (pane.hover >= 0) {
    draw.lineWidth = 4.5;
    draw.strokeStyle = "#fff";
    rectangle(pane.hover);
    draw.lineWidth = 2.5;
    draw.strokeStyle = "#111";
    rectangle(pane.hover);
  }
  const bar = scaleBar(scale);
  pane.bar.hidden = false;
  pane.bar.style.width = `${bar.px}px`;
  pane.bar.firstElementChild.textContent = bar.text;
}

// White below black dashes: seen on any tissue and any colours.
function drawTruth(draw, { x, y, scale }, path) {
  draw.save();
  draw.translate(x, y);
  draw.scale(scale, scale);
  for (const [colour, width, dash] of [["#fff", 4, []], ["#111", 2, [8, 5]]]) {
    draw.strokeStyle = colour;
    draw.lineWidth = width / scale;
    draw.setLineDash(dash.map((v) => v / scale));
    draw.stroke(path);
  }
  draw.restore();
}

export function scaleBar(scale) {  // of 1, 2, 5, 10 ... µm, at most 160 px
  const { mpp } = state.slide, most = 160 * mpp / scale, power = 10 ** Math.floor(Math.log10(most));
  const um = [5, 2, 1].map((k) => k * power).find((v) => v <= most) || power;
  return { px: um * scale / mpp, text: um < 1000 ? `${um} µm` : `${um / 1000} mm` };
}

function hoverAt(pane, at) { tell(tileAt(state.slide, at.x, at.y)); }

export function tell(k) {  // of both runs, where two are shown
  for (const pane of sides()) if (pane.viewer) tellOn(pane, k);
}

export function retell() { for (const pane of sides()) if (pane.viewer && pane.hover >= 0) tellOn(pane, pane.hover); }

function tellOn(pane, k) {
  if (k !== pane.hover) { pane.hover = k; decorate(pane); }
  if (k < 0 || !state.slide || k >= state.slide.n) { pane.readout.textContent = ""; return; }
  const lines = [`tile ${k} at ${state.slide.x_l0[k]}, ${state.slide.y_l0[k]}`];
  layersOf(runOf(pane)).forEach((layer, at) => {
    const known = values(runOf(pane), at);
    lines.push(`${plain(layer.name)}: ${known ? digits(known[k]) : "…"}`);
  });
  pane.readout.textContent = lines.join("\n");
}

export function goTo(k) {
  const slide = state.slide, [w, h] = slide.tile, pane = panes[0];
  const box = itemOf(pane).imageToViewportRectangle(slide.xs[k] - w, slide.ys[k] - h, 3 * w, 3 * h);
  pane.viewer.viewport.fitBounds(box);
  tell(k);
}
