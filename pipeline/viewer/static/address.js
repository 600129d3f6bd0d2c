// The address tells slide, run, layer, place and zoom, so that a view can be loaded again and shared. It lies behind the
// # and never reaches the server; the token was taken out of the address before this page came.
import { $, panes, runOf, say, state } from "./state.js";
import { place, view } from "./panes.js";

const CHOICES = [["layer", "layer"], ["scale", "scale"], ["colours", "palette"]];
let due = 0, silent = false;

export function read() { return new URLSearchParams(location.hash.slice(1)); }

// The choices of the address, made before a slide is opened. Returns the slide's number, -1 for none.
export function choose() {
  const asked = read(), runs = state.index.runs.map((r) => r.name);
  for (const [name, id] of [["run", "run0"], ["right", "run1"]]) {
    if (runs.includes(asked.get(name))) $(id).value = String(runs.indexOf(asked.get(name)));
  }
  $("two").checked = asked.has("right") && runs.length > 0;
  for (const id of ["scale", "palette"]) {
    const wanted = asked.get(id === "palette" ? "colours" : id);
    if (wanted && [...$(id).options].some((o) => o.value === wanted)) $(id).value = wanted;
  }
  state.layer = asked.get("layer") || "";
  const [x, y, um] = ["x", "y", "um"].map((k) => Number(asked.get(k)));
  state.goal = asked.get("x") !== null && [x, y, um].every(Number.isFinite) && um > 0 ? { x, y, um } : null;
  const id = asked.get("slide");
  return id === null ? -1 : state.index.slides.findIndex((s) => s.id === id);
}

export function told() {  // the address of what is seen
  const at = view(panes[0]), runs = state.index.runs, made = new URLSearchParams();
  made.set("slide", state.slide.id);
  if (runs[runOf(panes[0])]) made.set("run", runs[runOf(panes[0])].name);
  if ($("two").checked && runs[runOf(panes[1])]) made.set("right", runs[runOf(panes[1])].name);
  for (const [name, id] of CHOICES) if ($(id).value) made.set(name, $(id).value);
  if (at) {
    made.set("x", Math.round(at.x));
    made.set("y", Math.round(at.y));
    made.set("um", Number(at.um.toPrecision(4)));
  }
  return `#${made}`;
}

export function remember() {  // soon: a browser takes only so many changes a second
  if (silent || due || !state.slide) return;
  due = setTimeout(() => {
    due = 0;
    if (!state.slide) return;
    const now = told(), before = read().get("slide");
    if (now === location.hash) return;
    if (before !== null && before !== state.slide.id) history.pushState(null, "", now);
    else history.replaceState(null, "", now);
  }, 250);
}

export async function copy() {
  const text = location.origin + location.pathname + told();
  history.replaceState(null, "", told());
  try {
    await navigator.clipboard.writeText(text);
    say("The address of this view is copied. Whoever opens it needs the viewer's own link first.");
  } catch {
    say("The address of this view is in the browser's address line.");
  }
}

export function startAddress(open) {
  const changed = () => {
    const number = choose();
    if (number < 0) return;
    if (number === state.number && state.goal) { panes.forEach((p) => p.viewer && place(p, state.goal)); open.again(); }
    else open.slide(number);
  };
  window.addEventListener("popstate", changed);
}
