"""The table of names, and how fused projections are taken apart."""

import torch

from owl2_hf.modeling import MplugOwl2Config
from owl2_hf.modeling.conversion_mplug_owl2 import (
    FUSED,
    RENAMED,
    merge_query_key_value,
    split_query_key_value,
    to_original,
)

from ..conversion.conftest import assert_names_are_covered


def test_the_table_is_one_to_one():
    targets = [target for target in RENAMED.values() if target is not None]
    targets += [target for triple in FUSED.values() for target in triple]
    assert len(targets) == len(set(targets))
    assert not set(RENAMED) & set(FUSED)


def test_the_table_covers_the_published_model(golden_dir):
    keys = golden_dir("A").parents[1] / "spec" / "keys" / "owl2.json"
    assert_names_are_covered(MplugOwl2Config(), keys)


def test_fused_projections_are_interleaved_head_by_head():
    heads, head_dim, width = 3, 2, 6
    labels = torch.tensor(
        [
            [head * 100 + part * 10 + d for d in range(head_dim)]
            for head in range(heads)
            for part in range(3)
        ]
    )
    fused = labels.reshape(-1, 1).expand(-1, width)
    query, key, value = split_query_key_value(fused, heads)
    assert query[:, 0].tolist() == [0, 1, 100, 101, 200, 201]
    assert key[:, 0].tolist() == [10, 11, 110, 111, 210, 211]
    assert value[:, 0].tolist() == [20, 21, 120, 121, 220, 221]
    assert torch.equal(merge_query_key_value([query, key, value], heads), fused)


def test_a_table_whose_ids_may_all_be_predicted_goes_back_whole():
    config = MplugOwl2Config(output_vocab_size=None, text_config={})
    table = torch.ones(5, 2)
    assert torch.equal(to_original("lm_head.weight", {"lm_head.weight": table}, config), table)
