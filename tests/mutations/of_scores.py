"""Mutations of scores, opinions, losses, training and conversion.

Keys: the file below src/owl2_hf, and that of its tests. Values: text that occurs once in it, what
stands there instead, and the test that must fail then.
"""

CASES: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("scoring/labels.py", "tests/scoring/test_labels.py"): [
        (
            "return (num_levels - 1) * (mos - low) / (high - low) + 1, (num_levels - 1) * std / "
            "(high - low)",
            "return num_levels * (mos - low) / (high - low) + 1, (num_levels - 1) * std / (high - "
            "low)",
            "test_soft_labels_are_those_of_the_original",
        ),
        (
            "if mos <= low + index / num_levels * (high - low) + _WIDER:",
            "if mos < low + index / num_levels * (high - low) - _WIDER:",
            "test_levels_are_those_of_the_original_also_at_their_bounds",
        ),
        (
            "if deviation < MIN_STD:",
            "if deviation < 2 * MIN_STD:",
            "test_soft_labels_are_those_of_the_original",
        ),
        (
            "beta = (1 - alpha * total) / num_levels",
            "beta = (1 - total) / num_levels",
            "test_soft_labels_are_those_of_the_original",
        ),
        (
            "return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)",
            "return math.exp(-z * z) / math.sqrt(2 * math.pi)",
            "test_soft_labels_are_those_of_the_original",
        ),
        (
            "return (1 + math.erf(z / math.sqrt(2))) / 2",
            "return (1 + math.erf(z)) / 2",
            "test_soft_labels_are_those_of_the_original",
        ),
    ],
    ("scoring/losses.py", "tests/scoring/test_losses.py"): [
        (
            "(torch.special.xlogy(targets, targets) - targets * log_probs).sum() / len(logits)",
            "(-targets * log_probs).sum() / len(logits)",
            "test_losses_of_single_images_are_those_of_the_original",
        ),
        (
            "to_device(positions - 1, logits)",
            "to_device(positions, logits)",
            "test_losses_of_single_images_are_those_of_the_original",
        ),
        (
            "        if over_vocabulary\n        else _select",
            "        if False\n        else _select",
            "test_scores_over_the_levels_and_over_the_vocabulary_are_those_of_the_original",
        ),
        (
            "torch.arange(len(level_ids), 0, -1, device=probs.device)",
            "torch.arange(len(level_ids) - 1, -1, -1, device=probs.device)",
            "test_scores_over_the_levels_and_over_the_vocabulary_are_those_of_the_original",
        ),
        (
            "(probs * (values - scores[:, None]) ** 2).sum(-1).sqrt()",
            "(probs * (values - scores[:, None]) ** 2).sum(-1)",
            "test_scores_over_the_levels_and_over_the_vocabulary_are_those_of_the_original",
        ),
        (
            "(first - second) / (math.sqrt(2) * deviation)",
            "(first - second) / deviation",
            "test_the_fidelity_loss_and_its_gradient_are_those_of_the_original",
        ),
        (
            "(predicted * target + _TINY).sqrt() + ((1 - predicted) * (1 - target) + _TINY).sqrt()",
            "(predicted * target + _TINY).sqrt() + (1 - predicted * target + _TINY).sqrt()",
            "test_the_fidelity_loss_and_its_gradient_are_those_of_the_original",
        ),
        (
            "variance = score_stds[0] ** 2 + score_stds[1] ** 2 + _TINY",
            "variance = score_stds[0] ** 2 + _TINY",
            "test_the_fidelity_loss_and_its_gradient_are_those_of_the_original",
        ),
        (
            "variance = variance.detach() if detach_score_stds else variance",
            "variance = variance",
            "test_deviations_of_the_scores_are_detached_unless_told_otherwise",
        ),
        (
            "torch.where(is_better, predicted, 1 - predicted).sqrt()",
            "torch.where(is_better, predicted, 1 - predicted)",
            "test_pairs_without_deviations_are_those_of_the_original",
        ),
        (
            "total = total + weights.image * (rest + weights.level * level)",
            "total = total + weights.image * rest + weights.level * level",
            "test_the_parts_sum_with_their_weights",
        ),
    ],
    ("scoring/statistics.py", "tests/scoring/test_statistics.py"): [
        (
            "return (last - (counts - 1) / 2)[place]",
            "return last[place]",
            "test_ranks_with_ties_agree_with_scipy",
        ),
        (
            "spread = np.sqrt((first @ first) * (second @ second))",
            "spread = np.sqrt(first @ first) * (second @ second)",
            "test_correlations_are_those_of_the_original",
        ),
        (
            "scaled = (std**2 + (mean - other_mean) ** 2) / (2 * other_std**2 + _TINY)",
            "scaled = (std**2 + (mean - other_mean) ** 2) / (other_std**2 + _TINY)",
            "test_distances_of_distributions_are_those_of_the_original",
        ),
        (
            "np.sqrt((std**2 + other_std**2) / 2))",
            "(std + other_std) / 2)",
            "test_distances_of_distributions_are_those_of_the_original",
        ),
        (
            "np.sqrt((mean - other_mean) ** 2 + (std - other_std) ** 2)",
            "np.sqrt((mean - other_mean) ** 2 + (std + other_std) ** 2)",
            "test_distances_of_distributions_are_those_of_the_original",
        ),
        (
            "return (b1 - b2) / (1 + np.exp(-(x - b3) / b4)) + b2",
            "return (b1 - b2) / (1 + np.exp((x - b3) / b4)) + b2",
            "test_the_logistic_fit_goes_from_its_lower_to_its_upper_limit",
        ),
        (
            "[(1 - confidence) / 2, (1 + confidence) / 2]",
            "[1 - confidence, confidence]",
            "test_an_interval_leaves_as_much_out_below_as_above",
        ),
    ],
    ("modeling/scoring_mplug_owl2.py", "tests/scoring/test_scorer.py"): [
        (
            "return low + (high - low) * levels.new_tensor(preset.values)",
            "return low + high * levels.new_tensor(preset.values)",
            "test_a_score_is_the_expected_value_of_the_levels",
        ),
        (
            "mean = float(probs @ values)",
            "mean = float(probs @ values.flip(0))",
            "test_a_score_is_the_expected_value_of_the_levels",
        ),
        (
            "torch.stack([logits[:, own].mean(-1) for own in ids], -1)",
            "torch.stack([logits[:, own].amax(-1) for own in ids], -1)",
            "test_words_of_a_group_are_averaged_before_the_softmax",
        ),
    ],
    ("scoring/scorer.py", "tests/scoring/test_scorer.py"): [
        (
            "torch.stack(probs).mean(0).log()",
            "torch.stack(probs).amax(0).log()",
            "test_a_score_over_crops_is_that_of_their_mean_probabilities",
        ),
    ],
    ("scoring/tensors.py", "tests/scoring/test_tensors.py"): [
        (
            "images = (images - mean) / std",
            "images = images / std - mean",
            "test_pixels_are_within_pils_rounding_of_the_image_processors",
        ),
        (
            "return levels.softmax(-1) @ level_values(levels, scorer.preset)",
            "return levels.sigmoid() @ level_values(levels, scorer.preset)",
            "test_scores_are_the_scorers",
        ),
    ],
    ("scoring/comparison.py", "tests/scoring/test_comparison.py"): [
        (
            "qualities.square().sum() / 2",
            "qualities.square().sum()",
            "test_the_estimate_is_a_maximum",
        ),
        (
            "whole[-1, :-1], whole[:-1, -1] = preferred, 1 - preferred",
            "whole[-1, :-1], whole[:-1, -1] = 1 - preferred, preferred",
            "test_a_picture_that_is_preferred_scores_higher",
        ),
    ],
    ("scoring/frames.py", "tests/test_videos.py"): [
        (
            "math.floor(metadata.fps * second)",
            "math.ceil(metadata.fps * second)",
            "test_one_frame_a_second_is_taken",
        ),
    ],
    ("scoring/judging.py", "tests/scoring/test_judging.py"): [
        (
            "return (score.score - low) / step + 1, score.std / step",
            "return (score.score - low) / step, score.std / step",
            "test_each_statistic_is_that_of_the_scores_and_the_opinions",
        ),
    ],
    ("training/trainer.py", "tests/training/test_trainer.py"): [
        (
            "return -((1 - self.factor) * hard + self.factor * soft) / count.to(hard.device)",
            "return -(hard + self.factor * soft) / count.to(hard.device)",
            "test_labels_are_smoothed_over_the_ids_that_can_be_predicted",
        ),
        (
            "soft = log_probs[:, is_predicted].mean(-1).sum()",
            "soft = log_probs.mean(-1).sum()",
            "test_labels_are_smoothed_over_the_ids_that_can_be_predicted",
        ),
    ],
    ("training/score_trainer.py", "tests/training/test_scores.py"): [
        (
            "total = total + loss * len(pairs)",
            "total = total + loss",
            "test_the_soft_loss_is_the_sum_of_its_parts",
        ),
    ],
    ("training/components.py", "tests/training/test_components.py"): [
        (
            'return num_layers + 1 if "embeddings." in name else 0',
            'return num_layers if "embeddings." in name else 0',
            "test_layers_of_the_vision_encoder_learn_slower_from_top_to_bottom",
        ),
    ],
    ("training/scores.py", "tests/training/test_scores.py"): [
        (
            "other + (other >= row)",
            "other",
            "test_pairs_are_of_one_data_set_and_other_ones_in_each_epoch",
        ),
    ],
    ("conversion/lora.py", "tests/conversion/test_lora.py"): [
        (
            "total = total + update.scale * (update.up.float() @ update.down.float())",
            "total = total + (update.up.float() @ update.down.float())",
            "test_a_merged_fine_tune_gives_the_originals_numbers",
        ),
    ],
    ("conversion/stock_vision.py", "tests/conversion/test_initialize.py"): [
        (
            'mode="bicubic", align_corners=False, antialias=False',
            'mode="bicubic", align_corners=False, antialias=True',
            "test_another_picture_size_interpolates_the_positions_as_the_vision_model_does",
        ),
    ],
}
