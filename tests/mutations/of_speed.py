"""Mutations of what decides how much a prompt costs: host syncs, and compiled graphs.

Keys and values as in `of_models`.
"""

CASES: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("modeling/modeling_mplug_owl2_text.py", "tests/modeling/test_compiled.py"): [
        (
            "return torch.where(self.visual_mask, visual, text)",
            "return torch.where(self.visual_mask, text, visual)",
            "test_without_a_count_a_graph_computes_both_branches_and_selects",
        ),
        (
            "            if torch.compiler.is_compiling() or visual_mask.is_meta:",
            "            if visual_mask.is_meta:",
            "test_without_a_count_a_graph_computes_both_branches_and_selects",
        ),
        (
            "        if num_visual_tokens is None:\n            if torch",
            "        if num_visual_tokens is None or torch.compiler.is_compiling():\n            if torch",
            "test_a_mixed_prompt_costs_what_llamas_does_eager_and_compiled",
        ),
        (
            "mm_token_type_ids.bool().sum() == num_visual_tokens,",
            "mm_token_type_ids.bool().sum() >= 0,",
            "test_a_compiled_prompt_refuses_counts_that_disagree",
        ),
    ],
    ("modeling/modeling_mplug_owl2_text.py", "tests/modeling/test_syncs.py"): [
        (
            "            num_visual_tokens = 0\n",
            "            num_visual_tokens = None\n",
            "test_a_training_step_waits_once",
        ),
    ],
    ("modeling/modeling_mplug_owl2.py", "tests/modeling/test_compiled.py"): [
        (
            "tokens if torch.compiler.is_compiling() else list(tokens)",
            "list(tokens)",
            "test_another_number_of_images_needs_one_more_graph_at_most",
        ),
        (
            "None if torch.compiler.is_exporting() else len(image_features)",
            "None",
            "test_the_whole_model_compiled_costs_what_it_does_eager",
        ),
    ],
    ("modeling/modeling_mplug_owl2.py", "tests/modeling/test_syncs.py"): [
        (
            "inputs_embeds = insert(image_features, inputs_embeds, image_mask)",
            "inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_features)",
            "test_a_training_step_waits_once",
        ),
        (
            '        return found.get("visual")',
            "        return None",
            "test_a_prompt_waits_once",
        ),
        (
            "input_ids.shape[1] >= per_image:\n            counts",
            "input_ids.shape[1] >= 1:\n            counts",
            "test_a_decoding_step_never_waits",
        ),
        (
            "num_labels = torch.full((), num_labels, device=logits.device)",
            "num_labels = torch.as_tensor(num_labels, device=logits.device)",
            "test_num_items_in_batch_is_not_copied_to_the_device",
        ),
    ],
    ("modeling/modeling_mplug_owl2_classification.py", "tests/modeling/test_syncs.py"): [
        (
            "values.new_full((), new)",
            "values.new_tensor(new)",
            "test_a_classifier_waits_once_for_each_reading_of_the_prompt",
        ),
    ],
    ("scoring/losses.py", "tests/training/test_scores.py"): [
        (
            "found = torch.stack([windows[..., place].eq(token) for place, token in enumerate(prefix)])",
            "found = windows.eq(torch.tensor(prefix)).movedim(-1, 0)",
            "test_the_soft_loss_makes_the_host_wait_once",
        ),
    ],
    ("training/score_trainer.py", "tests/training/test_scores.py"): [
        (
            "labels, has_std = read[:, :-1], read[:, -1].bool()",
            "labels, has_std = read[:, :-1], read[:, -1].ge(0)",
            "test_the_soft_loss_makes_the_host_wait_once",
        ),
    ],
}
