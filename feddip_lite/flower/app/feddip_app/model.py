"""The models: LeNet-5, AlexNet and ResNet-18, each with a width factor."""

from feddip_lite.core.models import build_model

__all__ = ["build_model"]
