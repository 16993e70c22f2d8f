"""LoRA files of other programs, read and written: peft, diffusers, kohya, LyCORIS, ComfyUI, XLabs.

`source` reads and checks a file, `layouts` says what its keys are, `names` which layers they stand for (`spellings`,
`family_names`), `settings` how strongly they act, `kinds` and `products` what their tensors stand for; `assemble` makes
entries of a patch from them.
"""

from mm.adapters.formats.reader import read_lora as read_lora
from mm.adapters.formats.writer import Layout as Layout
from mm.adapters.formats.writer import write_lora as write_lora
