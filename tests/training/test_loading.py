"""What a recipe makes of a model before it trains."""

from owl2_hf.training.loading import load_for_training
from owl2_hf.training.recipe import load_recipe


def test_the_lora_recipe_trains_less_than_a_twentieth():
    model, _ = load_for_training(load_recipe("lora", ["model=default"]))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert 0 < sum(sizes[name] for name in trained) < 0.05 * sum(sizes.values())
