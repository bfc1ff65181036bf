"""Encoders and heads: networks from images to features, and frozen maps from features to logits."""
