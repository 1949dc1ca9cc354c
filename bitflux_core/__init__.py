"""What a 1.58-bit FLUX is, in one process: ternary arithmetic, checkpoints, distillation, generation.

Importing it teaches diffusers to load and save ternary checkpoints (bitflux_core/diffusers_plugin.py).
"""

from bitflux_core import _diffusers_hook

_diffusers_hook.install()
