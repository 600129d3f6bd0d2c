// The view as a PNG: the panes as they are seen, with scale bar, colour bar and what they show.
import { $, fail, on, plain, runOf, say, short, sides, state } from "./state.js";
import { frameOf, itemOf, scaleBar } from "./panes.js";
import { verdictText } from "./legend.js";

const STRIP = 64;  // CSS px below each pane

export function download({ data, name }) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(data);
  link.download = name.replace(/[^\w.+-]+/g, "_");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function loaded(pane) {  // its pictures are there, or five seconds have passed
  for (let k = 0; k < 50; k++) {
    const world = pane.viewer.world;
    if ([...Array(world.getItemCount()).keys()].every((i) => world.getItemAt(i).getFullyLoaded())) return;
    await new Promise((done) => setTimeout(done, 100));
  }
}

export async function savePicture() {
  const shown = sides().filter(itemOf);
  if (!shown.length) return;
  await Promise.all(shown.map(loaded));
  const ratio = window.devicePixelRatio || 1;
  const boxes = shown.map((p) => p.canvas.getBoundingClientRect()), gap = 2;
  const width = boxes.reduce((sum, b) => sum + b.width + gap, -gap), height = boxes[0].height + STRIP;
  const canvas = document.createElement("canvas");
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const draw = canvas.getContext("2d");
  draw.scale(ratio, ratio);
  draw.fillStyle = "#fff";
  draw.fillRect(0, 0, width, height);
  let left = 0;
  shown.forEach((pane, k) => {
    const { width: w, height: h } = boxes[k];
    draw.save();
    draw.beginPath();
    draw.rect(left, 0, w, h);
    draw.clip();
    draw.drawImage(pane.viewer.drawer.canvas, left, 0, w, h);
    draw.drawImage(pane.canvas, left, 0, w, h);
    draw.restore();
    caption(draw, pane, left, h, w);
    left += w + gap;
  });
  const data = await new Promise((done) => canvas.toBlob(done, "image/png"));
  if (!data) { fail("this view is too large for a PNG: make the window smaller"); return; }
  const run = state.index.runs[runOf(shown[0])];
  const parts = [state.slide.id, run && run.name, $("layer").value].filter(Boolean);
  download({ data, name: `${parts.join("_")}.png` });
  say("The view is saved as PNG.");
}

function caption(draw, pane, left, top, width) {
  draw.fillStyle = "#111";
  draw.font = "13px system-ui, sans-serif";
  const run = state.index.runs[runOf(pane)];
  const text = [state.slide.id, run && run.name, verdictText(runOf(pane), state.number)].filter(Boolean).join("   ");
  draw.fillText(text, left + 10, top + 20, width - 20);
  const bar = scaleBar(frameOf(pane).scale), x = left + width - bar.px - 14;
  draw.fillRect(x, top + 48, bar.px, 4);
  draw.fillText(bar.text, x, top + 42);
  if (!pane.scale || !$("heat").checked) return;
  const shade = draw.createLinearGradient(left + 10, 0, left + 170, 0);
  pane.scale.stops.forEach((colour, k) => shade.addColorStop(k / (pane.scale.stops.length - 1), colour));
  draw.fillStyle = shade;
  draw.fillRect(left + 10, top + 30, 160, 10);
  draw.fillStyle = "#111";
  draw.font = "11px system-ui, sans-serif";
  const ends = [pane.scale.scores[0], pane.scale.scores[pane.scale.scores.length - 1]].map(short);
  draw.fillText(ends[0], left + 10, top + 54);
  draw.textAlign = "right";
  draw.fillText(ends[1], left + 170, top + 54);
  draw.textAlign = "left";
  draw.fillText(plain(pane.scale.what), left + 182, top + 40, Math.max(60, x - left - 196));
}

export function startPicture() {
  $("png").addEventListener("click", savePicture);
  on("download", download);
}
