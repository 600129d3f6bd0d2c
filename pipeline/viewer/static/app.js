// The page of the viewer: a list of slides, and one or two deep-zoom panes with layers on top of the slide.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const panes = [...document.querySelectorAll(".pane")].map((element, side) => ({
    side, element, canvas: element.querySelector("canvas"), bar: element.querySelector(".scalebar"),
    readout: element.querySelector(".readout"), viewer: null, heat: null, tissue: null, hover: -1, asked: 0,
  }));
  let index = null, slide = null, number = -1, shown = [], lookup = new Map(), asked = 0, wanted = -1, following = false;

  function fail(text) {
    $("message").textContent = text;
    $("message").hidden = !text;
  }

  async function get(address) {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }

  function option(select, value, text) {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    select.append(made);
  }

  const sides = () => ($("two").checked ? panes : panes.slice(0, 1));
  const runOf = (pane) => Number($(pane.side ? "run1" : "run0").value);
  const versioned = (address) => `${address}?v=${index.version}`;

  // ---------------------------------------------------------------- the list

  function prediction(entry) {
    return entry.predictions.find((p) => p.run === Number($("listrun").value));
  }

  function fillList() {
    const text = $("search").value.toLowerCase(), label = $("label").value;
    shown = index.slides.map((_, i) => i).filter((i) => {
      const entry = index.slides[i], told = prediction(entry);
      return (!text || `${entry.id} ${entry.patient}`.toLowerCase().includes(text)) &&
        (!label || entry.label === label) && (!$("wrong").checked || (told && told.wrong));
    });
    $("slides").replaceChildren(...shown.map(row));
    $("count").textContent = `${shown.length} of ${index.slides.length} slides`;
  }

  function row(i) {
    const entry = index.slides[i], told = prediction(entry);
    const item = document.createElement("li"), button = document.createElement("button");
    const text = document.createElement("div"), name = document.createElement("div"), sub = document.createElement("div");
    const picture = document.createElement(entry.readable ? "img" : "div");
    if (entry.readable) {
      picture.loading = "lazy";
      picture.alt = "";
      picture.src = versioned(`/thumb/${i}.jpg`);
    } else {
      picture.className = "none";
      button.disabled = true;
    }
    text.className = "text"; name.className = "name"; sub.className = "sub";
    name.textContent = entry.id;
    sub.textContent = entry.readable ? [entry.label && `label ${entry.label}`, entry.why].filter(Boolean).join(" · ") : "could not be read";
    if (told) {
      const verdict = document.createElement("div");
      verdict.className = told.wrong ? "sub wrong" : "sub";
      const value = `${told.of || "risk"} ${told.value.toFixed(3)}`;
      verdict.textContent = told.decision ? `${value} → ${told.decision}${told.wrong ? " ✗" : ""}` : value;
      text.append(name, sub, verdict);
    } else text.append(name, sub);
    button.append(picture, text);
    button.dataset.slide = i;
    button.setAttribute("aria-current", i === number);
    button.addEventListener("click", () => open(i));
    item.append(button);
    return item;
  }

  function step(by) {
    const usable = shown.filter((i) => index.slides[i].readable);
    if (!usable.length) return;
    const at = usable.indexOf(wanted);
    open(usable[at < 0 ? (by > 0 ? 0 : usable.length - 1) : (at + by + usable.length) % usable.length]);
  }

  // ---------------------------------------------------------------- the panes

  function source() {
    return {
      width: slide.width, height: slide.height, tileSize: slide.tileSize, tileOverlap: 0,
      minLevel: Math.ceil(Math.log2(slide.tileSize)) - 1,
      getTileUrl: ((i) => (level, x, y) => versioned(`/tile/${i}/${level}/${x}_${y}.jpg`))(number),
    };
  }

  async function open(i) {
    const mine = ++asked;
    wanted = i;  // keys may come faster than slides
    fail("");
    try {
      const told = await get(versioned(`/api/slide/${i}`));
      if (mine !== asked) return;
      slide = told;
      number = i;
      const [sx, sy] = slide.stretch;  // 1, 1 unless the slide's pixels are oblong: all below is px of the picture
      slide.places = sx === 1 && sy === 1 ? slide.coords : slide.coords.map(([x, y]) => [x * sx, y * sy]);
      slide.tile = [slide.tile_l0[0] * sx, slide.tile_l0[1] * sy];
      slide.bounds = slide.bounds.map((v, k) => v * (k % 2 ? sy : sx));
      slide.layer = slide.layer_l0 * sx;
    } catch (error) {
      fail(error.message);
      return;
    }
    const entry = index.slides[i];
    $("title").textContent = [entry.id, entry.patient && `patient ${entry.patient}`, entry.label].filter(Boolean).join(" · ");
    document.title = entry.id;
    const [w, h] = slide.tile;
    lookup = new Map();
    slide.places.forEach(([x, y], k) => {
      const key = `${Math.floor(x / w)},${Math.floor(y / h)}`;
      lookup.set(key, (lookup.get(key) || []).concat(k));
    });
    fillLayers();
    document.querySelectorAll("#slides button").forEach((b) => {
      const here = Number(b.dataset.slide) === i;
      b.setAttribute("aria-current", here);
      if (here) b.scrollIntoView({ block: "nearest" });
    });
    for (const pane of sides()) start(pane);
  }

  function fillLayers() {
    const before = $("layer").value, names = new Set();
    slide.runs.forEach((r) => r.layers.forEach((l) => names.add(l.name)));
    $("layer").replaceChildren();
    names.forEach((n) => option($("layer"), n, n.replaceAll("_", " ")));
    if (names.has(before)) $("layer").value = before;
  }

  function start(pane) {
    pane.asked++;
    pane.heat = pane.tissue = null;
    pane.hover = -1;
    pane.readout.textContent = "";
    if (!pane.viewer) {
      pane.viewer = OpenSeadragon({
        element: $(`osd${pane.side}`), showNavigationControl: false, drawer: "canvas", animationTime: 0.4,
        maxZoomPixelRatio: 4, visibilityRatio: 0.5, imageSmoothingEnabled: true, preserveImageSizeOnResize: true,
        gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, minZoomImageRatio: 0.6,
      });
      pane.viewer.innerTracker.keyDownHandler = pane.viewer.innerTracker.keyHandler = null; // the page has its own keys
      for (const name of ["update-viewport", "resize", "open", "animation"]) pane.viewer.addHandler(name, () => decorate(pane));
      pane.viewer.addHandler("open", () => addLayers(pane));
      for (const name of ["zoom", "pan"]) pane.viewer.addHandler(name, () => follow(pane));
      pane.element.addEventListener("mousemove", (event) => hover(pane, event));
      pane.element.addEventListener("mouseleave", () => tell(-1));
    }
    pane.viewer.open(source());
  }

  function follow(pane) {
    if (following || !$("two").checked) return;
    following = true;
    const other = panes[1 - pane.side].viewer;
    if (other && other.world.getItemCount() && pane.viewer.world.getItemCount()) {
      other.viewport.zoomTo(pane.viewer.viewport.getZoom(), null, true);
      other.viewport.panTo(pane.viewer.viewport.getCenter(), true);
    }
    following = false;
  }

  function layerOf(pane) {
    const run = slide && slide.runs.find((r) => r.run === runOf(pane));
    if (!run) return null;
    const at = run.layers.findIndex((l) => l.name === $("layer").value);
    return at < 0 ? null : { at, run: run.run, ...run.layers[at] };
  }

  function addLayers(pane) {
    const mine = ++pane.asked, viewer = pane.viewer;  // an answer to an older question must not win
    for (const kind of ["heat", "tissue"]) if (pane[kind]) { viewer.world.removeItem(pane[kind]); pane[kind] = null; }
    const put = (kind, url, x, width, opacity) => viewer.addSimpleImage({
      url, x: x / slide.width, y: kind === "tissue" ? slide.bounds[1] / slide.width : 0, width: width / slide.width, opacity,
      success: (event) => {
        if (mine !== pane.asked || pane[kind]) viewer.world.removeItem(event.item);
        else { pane[kind] = event.item; pane.element.dataset[kind] = "ready"; apply(); }
      },
    });
    pane.element.dataset.heat = pane.element.dataset.tissue = "loading";
    const layer = layerOf(pane);
    if (layer) {
      put("heat", `/layer/${layer.run}/${layer.at}/${number}.png?scale=${$("scale").value}&v=${index.version}`,
        0, slide.layer, 0);
    }
    const run = index.runs[runOf(pane)];
    pane.element.querySelector(".lack").textContent = run && $("layer").value && !layer ?
      `${run.name} has no ${$("layer").value.replaceAll("_", " ")} here` : "";
    put("tissue", versioned(`/tissue/${number}.png`), slide.bounds[0], slide.bounds[2], 0);
    decorate(pane);
  }

  function apply() {
    for (const pane of panes) {
      if (pane.heat) pane.heat.setOpacity($("heat").checked ? $("opacity").value / 100 : 0);
      if (pane.tissue) pane.tissue.setOpacity($("tissue").checked ? 1 : 0);
      decorate(pane);
    }
  }

  const relayer = () => { for (const pane of sides()) if (pane.viewer && slide) addLayers(pane); };

  // What lies on a pane but is no picture: the tile grid, the hovered tile, the scale bar.
  function decorate(pane) {
    const viewer = pane.viewer;
    if (!viewer || !slide || !viewer.world.getItemCount()) return;
    const box = pane.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    pane.canvas.width = box.width * ratio;
    pane.canvas.height = box.height * ratio;
    const draw = pane.canvas.getContext("2d");
    draw.scale(ratio, ratio);
    const item = viewer.world.getItemAt(0);
    const a = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const b = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(slide.width, 0));
    const scale = (b.x - a.x) / slide.width, [w, h] = slide.tile;
    const rectangle = (k) => {
      const [x, y] = slide.places[k];
      draw.strokeRect(a.x + x * scale, a.y + y * scale, w * scale, h * scale);
    };
    if ($("grid").checked && w * scale > 3) {
      draw.strokeStyle = "rgba(20, 30, 120, .55)";
      draw.lineWidth = 1;
      const left = -a.x / scale - w, top = -a.y / scale - h;
      const right = left + box.width / scale + 2 * w, bottom = top + box.height / scale + 2 * h;
      slide.places.forEach(([x, y], k) => { if (x > left && x < right && y > top && y < bottom) rectangle(k); });
    }
    if (pane.hover >= 0) {
      draw.strokeStyle = "#111";
      draw.lineWidth = 2.5;
      rectangle(pane.hover);
    }
    const most = 160 * slide.mpp / scale, power = 10 ** Math.floor(Math.log10(most));
    const um = [5, 2, 1].map((k) => k * power).find((v) => v <= most) || power;
    pane.bar.hidden = false;
    pane.bar.style.width = `${um * scale / slide.mpp}px`;
    pane.bar.firstElementChild.textContent = um < 1000 ? `${um} µm` : `${um / 1000} mm`;
  }

  function tileAt(x, y) {
    const [w, h] = slide.tile;
    for (const [dx, dy] of [[0, 0], [-1, 0], [0, -1], [-1, -1]]) {
      for (const k of lookup.get(`${Math.floor(x / w) + dx},${Math.floor(y / h) + dy}`) || []) {
        const [left, top] = slide.places[k];
        if (x >= left && x < left + w && y >= top && y < top + h) return k;
      }
    }
    return -1;
  }

  function hover(pane, event) {
    if (!slide || !pane.viewer.world.getItemCount()) return;
    const box = pane.canvas.getBoundingClientRect();
    const at = pane.viewer.world.getItemAt(0).viewerElementToImageCoordinates(
      new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top));
    tell(tileAt(at.x, at.y));
  }

  function tell(k) {  // of both runs, where two are shown
    for (const pane of sides()) if (pane.viewer) tellOn(pane, k);
  }

  function tellOn(pane, k) {
    if (k !== pane.hover) { pane.hover = k; decorate(pane); }
    if (k < 0) { pane.readout.textContent = ""; return; }
    const run = slide.runs.find((r) => r.run === runOf(pane));
    const lines = [`tile ${k} at ${slide.coords[k].join(", ")}`];
    for (const layer of run ? run.layers : []) lines.push(`${layer.name.replaceAll("_", " ")}: ${layer.values[k]}`);
    pane.readout.textContent = lines.join("\n");
  }

  function goToHighest() {
    const layer = slide && sides().map(layerOf).find(Boolean);
    if (!layer) return;
    const k = layer.values.reduce((best, value, i) => (value > layer.values[best] ? i : best), 0);
    const [x, y] = slide.places[k], [w, h] = slide.tile;
    const box = panes[0].viewer.world.getItemAt(0).imageToViewportRectangle(x - w, y - h, 3 * w, 3 * h);
    panes[0].viewer.viewport.fitBounds(box);
    tell(k);
  }

  // ---------------------------------------------------------------- controls

  function sideBySide() {
    const on = $("two").checked;
    panes[1].element.hidden = $("run1").hidden = !on;
    if (on && slide) start(panes[1]);
    requestAnimationFrame(() => panes.forEach((p) => p.viewer && p.viewer.forceResize()));
  }

  function toggle(id) {
    $(id).checked = !$(id).checked;
    $(id).dispatchEvent(new Event("change"));
  }

  function help() {
    $("keys").hidden = !$("keys").hidden;
    $("help").setAttribute("aria-expanded", !$("keys").hidden);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input[type=search], select, input[type=range]");
    if (event.key === "Escape") { $("keys").hidden = true; event.target.blur(); return; }
    if (typing) return;
    const viewport = panes[0].viewer && panes[0].viewer.viewport;
    const move = (x, y) => viewport && viewport.panBy(viewport.deltaPointsFromPixels(new OpenSeadragon.Point(x * 120, y * 120)));
    const act = {
      n: () => step(1), p: () => step(-1), h: () => toggle("heat"), t: () => toggle("tissue"), g: () => toggle("grid"),
      s: () => toggle("two"), "?": help, "/": () => $("search").focus(), x: goToHighest,
      l: () => { const s = $("layer"); if (s.length) { s.selectedIndex = (s.selectedIndex + 1) % s.length; relayer(); } },
      0: () => viewport && viewport.goHome(), "+": () => viewport && viewport.zoomBy(1.5), "=": () => viewport && viewport.zoomBy(1.5),
      "-": () => viewport && viewport.zoomBy(1 / 1.5), ArrowLeft: () => move(-1, 0), ArrowRight: () => move(1, 0),
      ArrowUp: () => move(0, -1), ArrowDown: () => move(0, 1),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  }

  async function main() {
    index = await get("/api/index");
    $("work").textContent = index.work;
    index.runs.forEach((r, k) => ["listrun", "run0", "run1"].forEach((id) => option($(id), k, r.name)));
    if (index.runs.length > 1) $("run1").value = "1";
    [...new Set(index.slides.map((s) => s.label).filter(Boolean))].sort().forEach((l) => option($("label"), l, l));
    fillList();
    $("search").addEventListener("input", fillList);
    for (const id of ["label", "listrun", "wrong"]) $(id).addEventListener("change", fillList);
    for (const id of ["heat", "tissue", "grid"]) $(id).addEventListener("change", apply);
    $("opacity").addEventListener("input", apply);
    for (const id of ["layer", "scale", "run0", "run1"]) $(id).addEventListener("change", relayer);
    $("two").addEventListener("change", sideBySide);
    $("help").addEventListener("click", help);
    document.addEventListener("keydown", onKey);
    step(1);
  }

  main().catch((error) => fail(error.message));
})();
