"""KaniTTS in four experiments, beside the recipe kani_lora.

    python sweep.py config/kani_lora.py config/kani_experiments.py --out_dir=out/kani
    python sweep.py config/kani_lora.py config/kani_experiments.py --out_dir=out/kani_2 --epochs=1    a shorter look

The first three are the examples "conservative", "balanced" and "aggressive" in the README of the authors'
KaniTTS-Finetune-pipeline (alpha equals the rank, as it recommends), "heavy" is the second in its
config/experiments.yaml. Keys that are not here are those of kani_lora.
"""

experiments = {
    "conservative": {
        "lora_rank": 8, "lora_alpha": 8.0, "lora_targets": ["q_proj", "v_proj"], "learning_rate": 2e-5, "epochs": 1.0,
    },
    "balanced": {
        "lora_rank": 16, "lora_alpha": 16.0, "lora_targets": ["q_proj", "v_proj", "w1", "w2", "w3"],
        "learning_rate": 5e-5, "epochs": 2.0,
    },
    "aggressive": {
        "lora_rank": 32, "lora_alpha": 32.0,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3"],
        "learning_rate": 5e-5, "epochs": 3.0,
    },
    "heavy": {
        "lora_rank": 32, "lora_alpha": 32.0,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3", "in_proj"],
        "learning_rate": 2e-5, "epochs": 1.0,
    },
}  # fmt: skip
