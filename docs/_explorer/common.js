"use strict";
const $ = (id) => document.getElementById(id);
const reduced = matchMedia("(prefers-reduced-motion: reduce)");
const clamp = (x, lo, hi) => Math.min(Math.max(x, lo), hi);

/** A child of an SVG element. */
function draw(parent, tag, attributes, text) {
  const node = document.createElementNS(parent.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

/** An emptied SVG whose units are pixels of the screen, with its text alternative. -> its width */
function blank(svg, height, description) {
  const width = widthOf(svg);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", description);
  svg.replaceChildren();
  return width;
}

/** The room that an SVG has, in pixels of the screen. */
function widthOf(svg) {
  const style = getComputedStyle(svg.parentElement);
  return Math.max(svg.parentElement.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight), 240);
}

/** Call move(x in the SVG's pixels) where the mouse or a finger drags, and where it taps. A finger that scrolls the page moves nothing. */
function onDrag(svg, move) {
  let down = null; // where a finger came down that has not moved sideways yet
  const at = (event) => move(event.clientX - svg.getBoundingClientRect().left);
  svg.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    svg.setPointerCapture(event.pointerId);
    down = event.pointerType === "touch" ? event : null;
    if (!down) at(event);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!svg.hasPointerCapture(event.pointerId)) return;
    if (down && Math.abs(event.clientX - down.clientX) <= Math.abs(event.clientY - down.clientY)) return;
    down = null;
    at(event);
  });
  svg.addEventListener("pointerup", (event) => { if (svg.hasPointerCapture(event.pointerId)) at(event); });
}

/** A finger that begins to scroll the page on a slider leaves it as it was. */
for (const slider of document.querySelectorAll('input[type="range"]')) {
  let was;
  slider.addEventListener("pointerdown", () => { was = slider.value; });
  slider.addEventListener("pointercancel", () => { slider.value = was; slider.dispatchEvent(new Event("input")); });
}

/** f, once nothing has called it for so many milliseconds. */
function settled(f, milliseconds) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(f, milliseconds); };
}

/** Call f now and whenever the width of the page changes. */
function onWidth(f) {
  let width = document.body.clientWidth;
  addEventListener("resize", () => { if (document.body.clientWidth !== width) { width = document.body.clientWidth; f(); } });
  f();
}
