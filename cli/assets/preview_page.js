"use strict";
const main = document.querySelector("main");
const tip = document.getElementById("tip");
const tools = document.querySelector(".tools");
let current = null;

// One handler for all tokens: a sample may have tens of thousands.
document.addEventListener("pointerover", (event) => show(event.target.closest("i[data-i]")));

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") show(null);
  const block = event.target.closest(".pieces");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!block || !step) return;
  event.preventDefault();
  const shown = [...block.querySelectorAll("i")].filter((token) => token.offsetParent);
  const at = shown.indexOf(current);
  const next = at < 0 ? shown.at(step > 0 ? 0 : -1) : shown[at + step];
  if (!next) return;
  next.scrollIntoView({ block: "nearest" });
  show(next);
});

document.addEventListener("focusout", () => show(null));
document.addEventListener("scroll", place, { capture: true, passive: true });

main.addEventListener("click", (event) => {
  const button = event.target.closest("figure button");
  if (!button) return;
  const full = button.closest("figure").classList.toggle("full");
  button.setAttribute("aria-expanded", full);
});

tools.hidden = false;
tools.addEventListener("change", filter);
filter();

function show(token) {
  if (token === current) return;
  current?.classList.remove("on");
  current = token;
  tip.hidden = !token;
  if (!token) return;
  token.classList.add("on");
  const { i: ids, l: labels, p: position } = token.dataset;
  const one = /^-?\d+$/.test(ids);
  tip.textContent = [
    JSON.stringify(token.textContent),
    `${one ? "id" : "ids"} ${ids}`,
    `${one ? "label" : "labels"} ${labels} (${/^-100\b/.test(labels) ? "not trained" : "trained"})`,
    `position ${position}`,
  ].join("\n");
  place();
}

function place() {
  if (!current) return;
  const box = current.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? box.bottom + 6 : box.top - 6 - tip.offsetHeight}px`;
}

function filter() {
  const { problem, trained } = tools.elements; // no chooser where there is no problem
  const wanted = problem ? problem.value : "all";
  for (const sample of document.querySelectorAll("[data-problems]")) {
    const codes = sample.dataset.problems.split(" ").filter(Boolean);
    const fits = { all: true, any: codes.length > 0, none: codes.length === 0 };
    sample.hidden = !(fits[wanted] ?? codes.includes(wanted.slice("code ".length)));
  }
  for (const row of main.querySelectorAll(".row")) {
    row.hidden = !row.querySelector("article:not([hidden])");
  }
  main.classList.toggle("only-trained", trained.checked);
  const output = tools.querySelector("output");
  if (output) {
    const shown = main.querySelectorAll("article:not([hidden])").length;
    output.value = `${shown} of ${main.querySelectorAll("article").length} samples shown`;
  }
  show(null);
}
