from .embeddings import PromptEmbeddings, PromptEncoder
from .prompts import load_prompts

__all__ = ["PromptEmbeddings", "PromptEncoder", "load_prompts"]
