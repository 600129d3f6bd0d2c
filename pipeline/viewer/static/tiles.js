// Tiles by the score of the chosen layer: the highest, the lowest, or the most typical of each cluster; each jumps there.
import { $, digits, disclose, element, fail, json, on, panes, plain, runOf, state, versioned } from "./state.js";
import { fetchValues, layerOf } from "./slide.js";
import { goTo } from "./panes.js";

const MOST = 24;
let asked = 0;

const isOpen = () => !$("tiles").hidden;

export function toggleTiles(open = !isOpen()) {
  if (!state.slide) return;
  disclose($("tilesbutton"), $("tiles"), open);
  if (open) fill().then(() => { const first = $("crops").querySelector("button"); if (first && isOpen()) first.focus(); });
  else $("tilesbutton").focus();
}

// The k tiles with the highest (sign 1) or lowest (-1) values; of equal ones the first.
export function extreme(values, k, sign) {
  const order = [];
  let worst = -Infinity;
  for (let i = 0; i < values.length; i++) {
    const v = sign * values[i];
    if (order.length === k && v <= worst) continue;
    let at = order.length;
    while (at > 0 && sign * values[order[at - 1]] < v) at--;
    order.splice(at, 0, i);
    if (order.length > k) order.pop();
    worst = sign * values[order[order.length - 1]];
  }
  return order;
}

async function fill() {
  const mine = ++asked, slide = state.slide, layer = layerOf(panes[0]), way = $("order").value;
  const say = (text) => { $("tilenote").textContent = text; };
  let chosen;
  $("crops").replaceChildren();  // those of before are no answer to what is asked now
  say("looking …");
  try {
    const values = layer ? await fetchValues(slide, layer.run, layer.at) : null;
    if (way === "cluster") {
      const { clusters, why } = await json(versioned(`/clusters/${runOf(panes[0])}/${slide.number}`));
      chosen = clusters.flatMap((c, n) => c.tiles.map((k) => ({ k, text: `cluster ${n + 1}`, sub: `${Math.round(100 * c.share)} %` })));
      say(why || "the tiles nearest to the middle of each cluster, with the cluster's share of the slide");
    } else {
      chosen = values ? extreme(values, MOST, way === "top" ? 1 : -1).map((k) => ({ k, text: digits(values[k]), sub: `tile ${k}` })) : [];
      say(layer ? plain(layer.name) : "this run has no layer here");
    }
  } catch (error) { fail(error.message); return; }
  if (mine !== asked || slide !== state.slide) return;
  $("crops").replaceChildren(...chosen.map(({ k, text, sub }) => {
    const item = element("li"), button = element("button"), picture = element("img");
    picture.src = versioned(`/crop/${slide.number}/${k}.jpg`);
    picture.alt = "";
    picture.loading = "lazy";
    button.append(picture, element("span", "name", text), element("span", "sub", sub));
    button.dataset.tile = k;
    button.setAttribute("aria-label", `go to tile ${k}, ${text}`);
    button.addEventListener("click", () => goTo(k));
    item.append(button);
    return item;
  }));
}

export function refill() { if (isOpen()) fill(); }

export async function goToHighest() {
  const layer = state.slide && layerOf(panes[0]);
  if (!layer) return;
  const slide = state.slide, values = await fetchValues(slide, layer.run, layer.at);
  if (slide === state.slide && values.length) goTo(extreme(values, 1, 1)[0]);
}

export function startTiles() {
  $("tilesbutton").addEventListener("click", () => toggleTiles());
  $("order").addEventListener("change", fill);
  $("tiles").querySelector(".close").addEventListener("click", () => toggleTiles(false));
  on("opened", refill);
}
