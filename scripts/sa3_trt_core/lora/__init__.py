"""LoRA adapters of Stable Audio 3: reading, formulas, stacking, and the set of them that a model runs with."""
