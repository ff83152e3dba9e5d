"""Weights out: facts about them, model card, files for torchvision, timm, safetensors and ONNX."""
