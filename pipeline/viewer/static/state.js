// What the parts of the page share: the index, the slide that is open, the panes, and small helpers.
export const $ = (id) => document.getElementById(id);

export const panes = [...document.querySelectorAll(".pane")].map((element, side) => ({
  side, element, canvas: element.querySelector("canvas"), bar: element.querySelector(".scalebar"),
  readout: element.querySelector(".readout"), viewer: null, heat: null, tissue: null, truth: null, hover: -1, asked: 0,
}));

// index: what the server tells of slides and runs. slide: the open one (slide.js). number: its place in the index.
// wanted: the slide that was asked for last, which may not be here yet. goal: where its view shall be.
export const state = { index: null, slide: null, number: -1, wanted: -1, asked: 0, goal: null };

const heard = {};

export function on(what, act) { (heard[what] ||= []).push(act); }

export function emit(what, value) { for (const act of heard[what] || []) act(value); }

export function fail(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

let silence = 0;

export function say(text) {  // for some seconds
  clearTimeout(silence);
  $("said").textContent = text;
  silence = setTimeout(() => { $("said").textContent = ""; }, 7000);
}

export async function get(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

export const json = async (address) => (await get(address)).json();

export function option(select, value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  select.append(made);
}

export function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

export const sides = () => ($("two").checked ? panes : panes.slice(0, 1));
export const runOf = (pane) => Number($(pane.side ? "run1" : "run0").value);
export const versioned = (address) => `${address}${address.includes("?") ? "&" : "?"}v=${state.index.version}`;
export const plain = (name) => name.replaceAll("_", " ");
export const digits = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))));
export const short = (value) => {  // three digits in little room
  if (value === null || value === undefined) return "–";
  const least = Math.abs(value);
  return least && (least < 0.001 || least >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
};
export const entry = (i) => state.index.slides[i];
export const told = (i, run) => entry(i).predictions.find((p) => p.run === run);

export function skip(id) {  // the skip link moves the focus, and not the address, which tells what is seen
  $("skip").addEventListener("click", (event) => { event.preventDefault(); $(id).focus(); });
}

// A panel or menu with the button that opens it.
export function disclose(button, panel, open) {
  panel.hidden = !open;
  button.setAttribute("aria-expanded", open);
  requestAnimationFrame(() => panes.forEach((p) => p.viewer && p.viewer.forceResize()));
}
