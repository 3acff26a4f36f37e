"""Makes `tiny_llama/`: a random LLaMA and the logits that transformers computes with it, under each rotary scaling.

    python tests/lm/pretrained/make_tiny_llama.py

The tests read the committed files, so that they need neither transformers nor torch.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("tiny_llama")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    # Large enough for attention that is far from uniform.
    "initializer_range": 0.3,
}
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 24))


def main() -> None:
    """Writes the folder; the same numbers every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # bfloat16 halves the files, and is what most checkpoints are stored in.
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink()
    weights = {name: value.float() for name, value in model.state_dict().items()}
    logits = {}
    for name, scaling in SCALINGS.items():
        scaled = LlamaForCausalLM(LlamaConfig(**SIZES, rope_scaling=scaling)).float().eval()
        scaled.load_state_dict(weights)
        with torch.no_grad():
            logits[name] = scaled(torch.from_numpy(TOKENS)).logits.numpy()
    np.savez(FOLDER / "logits.npz", tokens=TOKENS.astype(np.int32), **logits)
    (FOLDER / "scalings.json").write_text(json.dumps(SCALINGS, indent=2) + "\n")


if __name__ == "__main__":
    main()
