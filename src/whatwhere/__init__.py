"""An image classifier that also says where. The public names are in ``__init__.pyi``; each loads when first used."""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
