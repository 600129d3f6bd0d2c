// The list of slides: filters, and rows of one height of which only those in sight are made, so that thousands cost
// nothing. One row is reached by Tab; arrows, Home, End and the page keys move from there.
import { $, element, emit, entry, option, runOf, panes, state, told, versioned } from "./state.js";

const ROW = 66, SPARE = 6;  // px; rows made above and below what is seen
let shown = [], at = 0;  // slides that pass the filters; the row that Tab reaches

export function fillLabels() {
  const labels = new Set(state.index.slides.map((s) => s.label).filter(Boolean));
  [...labels].sort().forEach((l) => option($("label"), l, l));
}

export function fillList() {
  const text = $("search").value.toLowerCase(), label = $("label").value, wrong = $("wrong").checked;
  const run = runOf(panes[0]);
  shown = [];
  state.index.slides.forEach((one, i) => {
    if (text && !`${one.id} ${one.patient}`.toLowerCase().includes(text)) return;
    if (label && one.label !== label) return;
    if (wrong && !(told(i, run) || {}).wrong) return;
    shown.push(i);
  });
  at = Math.max(0, shown.indexOf(state.wanted));
  $("count").textContent = `${shown.length} of ${state.index.slides.length} slides`;
  $("slides").style.height = `${shown.length * ROW}px`;
  draw(true);
}

let drawn = "";

function draw(anew) {
  const box = $("scroll");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
  const last = Math.min(shown.length, Math.ceil((box.scrollTop + (box.clientHeight || 600)) / ROW) + SPARE);
  if (!anew && drawn === `${first} ${last}`) return;
  drawn = `${first} ${last}`;
  const focused = document.activeElement && document.activeElement.closest("#slides") ? at : -1;
  const rows = [];
  for (let k = first; k < last; k++) rows.push(row(k));
  if (shown.length && (at < first || at >= last)) rows.push(row(Math.min(at, shown.length - 1)));  // for Tab
  $("slides").replaceChildren(...rows);
  if (focused >= 0) focus(focused);
}

function row(k) {
  const i = shown[k], one = entry(i), said = told(i, runOf(panes[0]));
  const item = element("li"), button = element("button"), text = element("span", "text");
  const picture = element(one.readable ? "img" : "span", one.readable ? "" : "none");
  if (one.readable) {
    picture.loading = "lazy";
    picture.alt = "";
    picture.src = versioned(`/thumb/${i}.jpg`);
  } else button.setAttribute("aria-disabled", "true");
  const sub = one.readable ? [one.label && `label ${one.label}`, one.why].filter(Boolean).join(" · ") : one.why || "could not be read";
  text.append(element("span", "name", one.id), element("span", "sub", sub));
  if (said) {
    const value = `${said.of || "risk"} ${said.value.toFixed(3)}`, call = said.decision || said.group;
    text.append(element("span", said.wrong ? "sub wrong" : "sub", call ? `${value} → ${call}${said.wrong ? " ✗" : ""}` : value));
  }
  button.title = one.id;
  button.append(picture, text);
  button.dataset.slide = i;
  button.dataset.row = k;
  button.tabIndex = k === at ? 0 : -1;
  button.setAttribute("aria-current", i === state.number);
  button.addEventListener("click", () => { if (one.readable) { at = k; emit("choose", i); } });
  item.setAttribute("aria-setsize", shown.length);
  item.setAttribute("aria-posinset", k + 1);
  item.style.top = `${k * ROW}px`;
  item.append(button);
  return item;
}

function focus(k) {
  const button = $("slides").querySelector(`button[data-row="${k}"]`);
  if (button) button.focus({ preventScroll: true });
}

function reveal(k) {
  const box = $("scroll"), top = k * ROW;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW - box.clientHeight;
}

export function mark() {  // the open slide, in sight
  const k = shown.indexOf(state.number);
  if (k >= 0) { at = k; reveal(k); }
  draw(true);
}

export function neighbour(by) {  // the next readable slide of the list, or -1
  const usable = shown.filter((i) => entry(i).readable);
  if (!usable.length) return -1;
  const k = usable.indexOf(state.wanted);
  return usable[k < 0 ? (by > 0 ? 0 : usable.length - 1) : (k + by + usable.length) % usable.length];
}

export function startList() {
  $("scroll").addEventListener("scroll", () => requestAnimationFrame(() => draw(false)));
  new ResizeObserver(() => draw(false)).observe($("scroll"));
  for (const [id, kind] of [["search", "input"], ["label", "change"], ["wrong", "change"]]) {
    $(id).addEventListener(kind, () => { $("scroll").scrollTop = 0; fillList(); });
  }
  $("slides").addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor($("scroll").clientHeight / ROW) - 1);
    const to = {
      ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1, PageDown: at + page, PageUp: at - page,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    at = Math.min(Math.max(to, 0), shown.length - 1);
    reveal(at);
    draw(true);
    focus(at);
  });
}
