import warnings

# timm still scripts a few layers when it is imported, and torch 2.15 warns of that in every process
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)

__version__ = "0.1.0"
