// What the colours and the answer of a run mean: the colour bar with its scores, the decision with its threshold.
import { $, digits, element, json, plain, runOf, short, state, told, versioned } from "./state.js";
import { colours } from "./slide.js";

const HOW = { percentile: "rank among this slide's tiles", raw: "from lowest to highest of this slide" };

export async function legend(pane, layer) {
  const box = pane.element.querySelector(".legend");
  box.hidden = !layer;
  pointing(pane);
  if (!layer) return;
  const stops = state.index.palettes[colours(layer)], how = layer.means ? "share" : $("scale").value;
  box.querySelector(".what").textContent = `${plain(layer.name)} (${layer.means || HOW[how]}${layer.signed ? ", 0 in the middle" : ""})`;
  box.querySelector(".colours").style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  const ticks = box.querySelector(".ticks"), mine = pane.scaleAsked = {};
  ticks.replaceChildren();
  pane.scale = null;
  const found = await json(versioned(`/scale/${layer.run}/${layer.at}/${state.number}?scale=${$("scale").value}`)).catch(() => null);
  if (mine !== pane.scaleAsked || !found) return;
  pane.scale = { ...found, stops, what: box.querySelector(".what").textContent };
  found.scores.forEach((score, k) => {
    const tick = element("span", "", short(score));
    if (how === "percentile" && !layer.signed) tick.append(element("small", "", `${100 * found.at[k]} %`));
    ticks.append(tick);
  });
}

// How well the maps of the run point at the truth, where `score --truth` measured that: of the layer that is shown.
export function pointing(pane) {
  const one = pane.truth && pane.truth.maps[$("layer").value], box = pane.element.querySelector(".points");
  const share = (value) => `${Math.round(100 * value)}\u00a0%`, parts = [];
  if (one && one.auc) parts.push(`tile AUC ${short(one.auc.mean)}${one.auc.sd === null ? "" : ` ± ${short(one.auc.sd)}`} over ${one.slides} slides`);
  if (one && one.pointing !== null) parts.push(`highest tile true in ${share(one.pointing)}`);
  if (one && one.froc !== null) parts.push(`FROC ${short(one.froc)}`);
  box.textContent = parts.length ? `against the truth: ${parts.join(", ")}` : (pane.truth && pane.truth.why) || "";
}

// "P(tumour) 0.812 ≥ 0.500 → tumour": the answer, the threshold that was frozen before, and what it decides.
export function verdictText(run, number) {
  const one = told(number, run);
  if (!one) return "";
  const value = `${one.of ? `P(${one.of})` : "risk"} ${digits(one.value)}`, parts = [value];
  if (one.threshold !== undefined) {
    parts.push(one.undecided ? `undecided from ${digits(one.undecided[0])} to ${digits(one.undecided[1])}` :
      `${one.value >= one.threshold ? "≥" : "<"} threshold ${digits(one.threshold)}`);
  }
  const call = one.decision || one.group;
  if (call) parts.push(`→ ${call}`);
  if (one.label) parts.push(one.wrong ? `✗ label ${one.label}` : `label ${one.label}`);
  return parts.join(" ");
}

// "slide 62 % (+0.81), clinical 38 % (−0.20 log-odds of tumour)": what each modality weighs and adds in a fused answer.
export function modalitiesText(run, number) {
  const one = told(number, run);
  if (!one || !one.modalities) return "";
  const each = one.modalities.map((m) => `${m.name} ${Math.round(100 * m.weight)} % (${m.adds < 0 ? "−" : "+"}${digits(Math.abs(m.adds))})`);
  return `rests on ${each.join(", ")}; in brackets what it adds, ${one.unit}`;
}

export function verdict(pane) {
  const run = runOf(pane), box = pane.element.querySelector(".verdict"), text = verdictText(run, state.number);
  box.replaceChildren();
  if (!state.index.runs[run]) return;
  box.append(element("b", "", state.index.runs[run].name));
  box.append(element("span", (told(state.number, run) || {}).wrong ? "wrong" : "", text || "no answer for this slide"));
  const rests = modalitiesText(run, state.number);
  if (rests) box.append(element("span", "rests", rests));
}
