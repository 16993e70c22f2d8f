"""Layout and scripts of the page.

Design choices
- On a desktop the pictures stand beside the fields. On a phone they come right after the prompt and its buttons, before
  the other settings, so that a drawn picture is seen without scrolling.
- Fields are kept in the browser's storage, and the name of the visit as long as the tab lives; nothing leaves the
  browser but that name.
"""

from __future__ import annotations

import json

_GRID = """
#TAB-tab {display: grid !important; gap: 12px 20px; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr);
  grid-template-areas: "ask result" "more result"; grid-template-rows: auto 1fr; align-items: start}
#TAB-ask {grid-area: ask} #TAB-result {grid-area: result} #TAB-more {grid-area: more}
@media (max-width: 760px) {
  #TAB-tab {grid-template-columns: minmax(0, 1fr); grid-template-areas: "ask" "result" "more"; grid-template-rows: none}
}
"""
# Gradio stretches a lone picture over the whole gallery and crops it; a fixed grid shows it whole.
CSS = (
    """
footer {display: none !important}
.gradio-container {max-width: 1240px !important; width: 100% !important; margin: auto !important}
.gradio-container > main, .gradio-container .wrap:has(> .contain), .gradio-container .contain {width: 100% !important;
  max-width: 100% !important; box-sizing: border-box}
.gradio-container .tabitem {padding: 12px 0 0 0 !important; border: none !important}
.mm-head {display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px}
.mm-head h1 {font-size: 1.5rem; font-weight: 700; margin: 0}
.mm-head span {overflow-wrap: anywhere}
.mm-head details {flex-basis: 100%; font-size: .85rem; opacity: .8}
.mm-head summary {cursor: pointer}
.mm-head ul, .mm-status ul {margin: 4px 0 0 0; padding-left: 18px; list-style: disc}
.mm-status p {margin: 0; overflow-wrap: anywhere}
.mm-status progress {width: 100%; height: 8px; margin-top: 6px; accent-color: var(--color-accent)}
.mm-status ul li {color: #9a5b00 !important; overflow-wrap: anywhere}
.dark .mm-status ul li {color: #f0b356 !important}
.mm-error p {color: #b42318 !important; font-weight: 600}
.dark .mm-error p {color: #ff8a80 !important}
.mm-details p {margin: 0 0 4px 0; overflow-wrap: anywhere}
.mm-details span {display: inline-block; margin-right: 14px; opacity: .8}
.mm-preview {width: min(100%, 512px); display: block; border-radius: 8px; margin: auto}
.mm-preview-box:not(:has(img)) {display: none}
.mm-gallery:not(:has(img)), #earlier:not(:has(img)) {display: none !important}
#like .wrap {font-size: .85rem; line-height: 1.2}
.mm-preview-box:has(~ .mm-gallery img) .mm-preview {width: 128px; margin: 0}
.mm-gallery, .mm-gallery .grid-wrap, #earlier, #earlier .grid-wrap {max-height: none !important;
  min-height: 0 !important; height: auto !important}
.mm-title {font-size: .85rem; opacity: .8; margin: 6px 0 0 0}
.mm-gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(min(45%, 240px), 1fr)) !important}
#earlier .grid-container {grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important}
.mm-gallery .thumbnail-lg, #earlier .thumbnail-lg {width: 100% !important; height: auto !important}
#chat {height: clamp(260px, calc(100vh - 500px), 640px) !important}
#talk-give, #talk-give .upload-container, #talk-give button {min-height: 0 !important}
#chat button[title="Share"], #chat button[aria-label="Share"] {display: none !important}
.mm-buttons {flex-wrap: nowrap !important}
@media (max-width: 760px) {
  .gradio-container {padding: 8px !important}
}
"""
    + _GRID.replace("TAB", "draw")
    + _GRID.replace("TAB", "picture")
    + _GRID.replace("TAB", "describe")
)
VISIT = "mm-visit"
FIELDS = "mm-fields"
LOAD = f"() => [sessionStorage.getItem({VISIT!r}) || '', localStorage.getItem({FIELDS!r}) || '']"
# On a phone the pictures may still be below the screen, where a tab begins with a picture to give.
_SHOW = "() => {{ if (innerWidth <= 760) document.getElementById({0!r}).scrollIntoView({{behavior: 'smooth'}}) }}"
SAVE_VISIT = f"(name) => {{ sessionStorage.setItem({VISIT!r}, name) }}"


def save_fields(model: str) -> str:
    """A script that keeps the values of fields, with the model that they are for."""
    return f"(...values) => {{ localStorage.setItem({FIELDS!r}, JSON.stringify([{json.dumps(model)}, ...values])) }}"


def show_results(name: str) -> str:
    """A script that scrolls a phone to the results of a tab."""
    return _SHOW.format(f"{name}-result")
