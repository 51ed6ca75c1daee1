from .unet_edm import ADMUNet2DModel, EDMUNet2DModel

__all__ = ["ADMUNet2DModel", "EDMUNet2DModel"]
