__version__ = "0.1.0"

# Two libraries log, at every import, what concerns their developers and not the reader of a notebook: optional kernels
# that are not there, and a deprecation of torch inside torchao. This runs before any of our modules imports them.
import logging as _logging
for _name in ('torchao', 'torch.utils._pytree', 'bitsandbytes.backends.cpu.ops'):
    _logging.getLogger(_name).setLevel(_logging.ERROR)
