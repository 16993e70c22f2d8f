"""ComfyUI's graphs: the sampler that made the picture, and what its links lead to.

Design choices
- `prompt` holds the graph that ran: nodes by id, each with class_type and inputs, where [id, slot] is a link.
  `workflow` holds the editor's view, with widget values by position; it is turned into the first form for the nodes
  whose widgets are known.
- A sampler is known by its inputs, not by its class, so that custom ones are found too: one with positive, and seed or
  steps; or one with guider and sigmas. The one nearest to an output node is taken.
- Every node is visited once, and plain values are followed through a few links, so that a graph with a circle ends,
  and a large one at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from mm.core.errors import UserError
from mm.core.foreign_settings import values
from mm.core.safe_json import Fields, parse_json

MAX_HOPS = 20  # links that a plain value is followed through
Graph = dict[str, dict[str, Any]]  # inputs by node id, with the class under "class_type"

_OUTPUTS = ("SaveImage", "PreviewImage", "SaveAnimatedWEBP", "SwarmSaveImageWS")
_TEXTS = ("text", "text_g", "clip_l", "t5xxl", "text_l", "prompt", "string", "value")
_MODELS = ("ckpt_name", "unet_name", "model_name", "model_path")
_PLAIN = ("value", "seed", "noise_seed", "int", "float", "string", "text", "steps")
# Names of widgets in the order of `widgets_values`; "" for the editor's own "control after generate".
_WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
    "CLIPTextEncode": ("text",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name",),
    "UnetLoaderGGUF": ("unet_name",),
    "EmptyLatentImage": ("width", "height"),
    "EmptySD3LatentImage": ("width", "height"),
    "RandomNoise": ("noise_seed",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KSamplerSelect": ("sampler_name",),
    "FluxGuidance": ("guidance",),
    "CFGGuider": ("cfg",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
}


def read(text: str, source: str) -> dict[str, Any]:
    """Settings of a `prompt` text. Raises UserError where it is no graph or has no sampler."""
    whole = Fields(parse_json(text, source, nan_as_none=True), source)
    graph: Graph = {}
    for key, node in whole.raw.items():
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            graph[key] = node["inputs"] | {"class_type": node.get("class_type")}
    return _settings(graph, source)


def read_workflow(text: str, source: str) -> dict[str, Any]:
    """Settings of a `workflow` text. Raises UserError where it is no graph or has no sampler that is known."""
    whole = Fields(parse_json(text, source, nan_as_none=True), source)
    links, nodes = whole.raw.get("links"), whole.raw.get("nodes")
    if not isinstance(nodes, list) or not isinstance(links, list):
        raise UserError(f"{source} is no workflow of ComfyUI (it has no nodes or no links)")
    sources = {str(x[0]): [str(x[1]), x[2]] for x in links if isinstance(x, list) and len(x) >= 5}
    graph: Graph = {}
    for node in nodes:
        if isinstance(node, dict) and isinstance(node.get("type"), str):
            graph[str(node.get("id"))] = _workflow_inputs(node, sources) | {"class_type": node["type"]}
    return _settings(graph, source)


def _workflow_inputs(node: dict[str, Any], sources: dict[str, list[Any]]) -> dict[str, Any]:
    """A node's inputs: widget values by name, then links, which take a widget's place."""
    given = node.get("widgets_values")
    inputs: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    if isinstance(given, list):
        inputs = {name: value for name, value in zip(_WIDGETS.get(node["type"], ()), given, strict=False) if name}
    for entry in node.get("inputs") or () if isinstance(node.get("inputs"), list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and str(entry.get("link")) in sources:
            inputs[entry["name"]] = sources[str(entry["link"])]
    return inputs


# ---- what a graph says -----------------------------------------------------------------------------------------------


def _settings(graph: Graph, source: str) -> dict[str, Any]:
    found = _sampler(graph)
    if found is None:
        raise UserError(f"{source} is no graph of ComfyUI with a sampler; its settings cannot be read")
    sampler = graph[found]
    parts = [sampler, *(_linked(graph, sampler, name) for name in ("noise", "guider", "sigmas", "sampler"))]
    guider = parts[2]
    ends = guider if "guider" in sampler else sampler
    read: dict[str, tuple[Any, Callable[[object], Any]]] = {
        "seed": (_first(graph, parts, ("seed", "noise_seed")), values.whole),
        "steps": (_first(graph, parts, ("steps",)), values.whole),
        "guidance": (_first(graph, parts, ("cfg",)), values.number),
        "sampler": (_first(graph, parts, ("sampler_name",)), values.named_text),
        "scheduler": (_first(graph, parts, ("scheduler",)), values.named_text),
        "prompt": (_prompt(graph, ends, ("positive", "conditioning")), values.text),
        "negative_prompt": (_prompt(graph, ends, ("negative",)), values.text),
        "model": (_upstream(graph, [ends, sampler], ("model",), _MODELS), values.named_text),
        "width": (_upstream(graph, [sampler], _LATENTS, ("width",)), values.size),
        "height": (_upstream(graph, [sampler], _LATENTS, ("height",)), values.size),
    }
    made = {name: check(value) for name, (value, check) in read.items()}
    strength = _upstream(graph, [ends], ("positive", "conditioning"), ("guidance",))  # distilled models
    if strength is not None:
        made["guidance"] = values.number(strength)
    loras = [str(node["lora_name"]) for node in _chain(graph, [ends, sampler], ("model",)) if "lora_name" in node]
    settings = {name: value for name, value in made.items() if value is not None}
    denoise = values.number(_first(graph, parts, ("denoise",)))
    other: dict[str, Any] = {"loras": loras} if loras else {}
    if denoise is not None and denoise < 1:
        other |= {"denoise": denoise}
    return settings | ({"other": other} if other else {})


_LATENTS = ("latent_image", "latent", "samples", "pixels")


def _is_sampler(node: dict[str, Any]) -> bool:
    plain = "positive" in node and bool({"seed", "noise_seed", "steps"} & set(node))
    return plain or ("guider" in node and "sigmas" in node)


def _sampler(graph: Graph) -> str | None:
    """The id of the sampler with the fewest links to an output; the first of all, where there is no output."""
    outputs = [key for key, node in graph.items() if node["class_type"] in _OUTPUTS]
    queue, seen = deque(outputs), set(outputs)
    while queue:
        key = queue.popleft()
        if _is_sampler(graph[key]):
            return key
        for value in graph[key].values():
            target = _target(graph, value)
            if target is not None and target not in seen:
                seen.add(target)
                queue.append(target)
    return next((key for key, node in graph.items() if _is_sampler(node)), None)


def _target(graph: Graph, value: object) -> str | None:
    """The node that a link leads to; None where the value is no link."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and str(value[0]) in graph:
        return str(value[0])
    return None


def _linked(graph: Graph, node: dict[str, Any], name: str) -> dict[str, Any]:
    target = _target(graph, node.get(name))
    return {} if target is None else graph[target]


def _plain(graph: Graph, value: object) -> object:
    """A value; of a link, the first plain value behind it."""
    for _ in range(MAX_HOPS):
        target = _target(graph, value)
        if target is None:
            break
        value = next((graph[target][name] for name in _PLAIN if name in graph[target]), None)
    return None if isinstance(value, list) else value


def _first(graph: Graph, nodes: list[dict[str, Any]], names: tuple[str, ...]) -> object:
    return next((_plain(graph, node[name]) for node in nodes for name in names if name in node), None)


def _chain(graph: Graph, starts: list[dict[str, Any]], names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The nodes behind inputs of these names, nearest first, each once."""
    queue, seen = deque(starts), set[str]()
    while queue:
        node = queue.popleft()
        for name in names:
            target = _target(graph, node.get(name))
            if target is not None and target not in seen:
                seen.add(target)
                queue.append(graph[target])
                yield graph[target]


def _upstream(graph: Graph, starts: list[dict[str, Any]], links: tuple[str, ...], names: tuple[str, ...]) -> object:
    """The first value of these names behind inputs of the names `links`."""
    nodes = _chain(graph, starts, links)
    return next((_plain(graph, node[name]) for node in nodes for name in names if name in node), None)


def _prompt(graph: Graph, start: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The texts behind an input, joined where conditionings were combined; None where no text is found.

    A ControlNet passes both prompts through: the input of the same name is followed there, the others else.
    """
    wide = (*names, "conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from")
    found: dict[str, None] = {}
    zeroed = False
    for node in _chain(graph, [{names[0]: next((start[n] for n in names if n in start), None)}], wide):
        zeroed = zeroed or node["class_type"] == "ConditioningZeroOut"
        text = next((_plain(graph, node[name]) for name in _TEXTS if name in node), None)
        if isinstance(text, str):
            found[text] = None
    if zeroed and names[0] == "negative":
        return ""
    return "\n".join(found) if found else None
