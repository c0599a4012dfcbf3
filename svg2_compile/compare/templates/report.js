"use strict";
(function () {
  const data = JSON.parse(document.getElementById("frame-data").textContent);
  const slider = document.getElementById("frame");
  const play = document.getElementById("play");
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  let timer = null;

  function show(index) {
    for (const kind of ["dense", "sparse", "difference"]) {
      const image = document.getElementById("frame-" + kind);
      image.src = data[kind][index];
      image.alt = "Frame " + data.number[index] + " " + image.dataset.alt;
    }
    document.getElementById("frame-number").textContent = data.number[index];
    document.getElementById("frame-quality").textContent = data.quality[index];
    for (const cursor of document.querySelectorAll(".cursor")) {
      const points = cursor.parentNode.querySelectorAll("circle");
      const x = points[data.number[index]].getAttribute("cx");
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }

  function start() {
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    timer = setInterval(function () {
      slider.value = (Number(slider.value) + 1) % data.number.length;
      show(Number(slider.value));
    }, still ? 1000 : 125);
  }

  slider.addEventListener("input", function () {
    stop();
    show(Number(slider.value));
  });
  play.addEventListener("click", function () {
    if (timer === null) start(); else stop();
  });

  const tip = document.getElementById("tip");

  function showTip(target) {
    const box = target.getBoundingClientRect();
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = (above < 4 ? box.bottom + 6 : above) + "px";
  }

  function tipOf(event) {
    return event.target instanceof Element ? event.target.closest("[data-tip]") : null;
  }

  function hideTip() {
    tip.hidden = true;
  }

  // The tooltip takes the place of the browser's own, which is slow; without this script the latter stays.
  for (const title of document.querySelectorAll("svg [data-tip] > title")) {
    title.parentNode.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  for (const kind of ["mouseover", "focusin"]) {
    document.addEventListener(kind, function (event) {
      const target = tipOf(event);
      if (target) showTip(target); else hideTip();
    });
  }
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, true);
  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape") hideTip();
  });

  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const grid of document.querySelectorAll("table[role=grid]")) {
    const rows = Array.from(grid.tBodies[0].rows, (row) => Array.from(row.cells).slice(1));
    grid.addEventListener("keydown", function (event) {
      const move = moves[event.key];
      const row = rows.findIndex((cells) => cells.includes(event.target));
      if (!move || row < 0) return;
      const next = rows[row + move[0]]?.[rows[row].indexOf(event.target) + move[1]];
      event.preventDefault();
      if (!next) return;
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }
})();
