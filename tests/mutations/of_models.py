"""Mutations of the model, of what it reads, and of what is read off it.

Keys: the file below src/owl2_hf, and that of its tests. Values: text that occurs once in it, what
stands there instead, and the test that must fail then.
"""

CASES: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("modeling/modeling_mplug_owl2_text.py", "tests/test_golden.py"): [
        (
            "LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)\n            if config.modality_specific_norms",
            "LlamaRMSNorm(config.hidden_size)\n            if config.modality_specific_norms",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)",
            "self.norm = LlamaRMSNorm(config.hidden_size, eps=1e-3)",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "self.scaling = self.head_dim**-0.5",
            "self.scaling = self.head_dim**-0.49",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "query, key = apply_rotary_pos_emb(query, key, *position_embeddings)",
            "key, query = apply_rotary_pos_emb(key, query, *position_embeddings[::-1])",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "visual_mask = mm_token_type_ids.bool()",
            "visual_mask = ~mm_token_type_ids.bool()",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "torch.argsort(visual_mask.flatten(), stable=True)",
            "torch.argsort(~visual_mask.flatten(), stable=True)",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "order, torch.argsort(order), num_text",
            "order, order, num_text",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "key = project(self.k_proj, self.visual_k_proj)",
            "key = project(self.k_proj, self.visual_v_proj)",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "value = project(self.v_proj, self.visual_v_proj)",
            "value = project(self.v_proj, None)",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "hidden_states = hidden_states + self.self_attn(normed, routing=routing, **kwargs)[0]",
            "hidden_states = normed + self.self_attn(normed, routing=routing, **kwargs)[0]",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "return hidden_states + self.mlp(normed)",
            "return hidden_states + self.mlp(hidden_states)",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "            self.visual_post_attention_layernorm,\n            hidden_states,",
            "            self.visual_input_layernorm,\n            hidden_states,",
            "test_language_model_gives_the_originals_numbers",
        ),
    ],
    ("modeling/modeling_mplug_owl2_text.py", "tests/modeling/test_modeling_mplug_owl2.py"): [
        (
            "if num_visual_tokens == 0 and not training:",
            "if num_visual_tokens == 0:",
            "test_training_touches_every_parameter_with_or_without_pictures",
        ),
    ],
    ("modeling/modeling_mplug_owl2_text.py", "tests/modeling/test_formulas.py"): [
        (
            "arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length",
            "arange(inputs_embeds.shape[1], device=inputs_embeds.device)",
            "test_tokens_behind_a_cache_are_read_at_their_own_positions",
        ),
        (
            "doublings = torch.ceil(torch.log2(",
            "doublings = torch.floor(torch.log2(",
            "test_the_rotary_base_grows_with_each_doubling_of_the_trained_length",
        ),
        (
            ".clamp_min(1) ** (dim / (dim - 2))",
            ".clamp_min(1) ** (dim / (dim + 2))",
            "test_the_rotary_base_grows_with_each_doubling_of_the_trained_length",
        ),
        (
            "scale = torch.log(position_ids.float() + 1) / math.log(length)",
            "scale = torch.log(position_ids.float()) / math.log(length)",
            "test_queries_beyond_the_trained_length_are_scaled_by_a_logarithm",
        ),
        (
            "lengths = position_ids.amax(-1, keepdim=True) + 1",
            "lengths = position_ids.amax(-1, keepdim=True)",
            "test_the_length_of_a_prompt_counts_its_first_position",
        ),
    ],
    ("modeling/modeling_mplug_owl2_abstractor.py", "tests/modeling/test_formulas.py"): [
        (
            "angles = np.outer(positions, 1.0 / 10000**frequencies)",
            "angles = np.outer(positions, 1.0 / 1000**frequencies)",
            "test_sines_and_cosines_have_frequencies_from_1_down_to_1_in_10000",
        ),
        (
            "np.concatenate([sincos_table(columns, half), sincos_table(rows, half)], axis=1)",
            "np.concatenate([sincos_table(rows, half), sincos_table(columns, half)], axis=1)",
            "test_a_patch_has_its_column_in_the_first_half_and_its_row_in_the_second",
        ),
    ],
    ("modeling/modeling_mplug_owl2_abstractor.py", "tests/test_golden.py"): [
        (
            "context = torch.cat([queries, image], dim=1)",
            "context = torch.cat([image, queries], dim=1)",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "heads(self.k_proj(context + context_positions)),",
            "heads(self.k_proj(context)),",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "heads(self.v_proj(context)),",
            "heads(self.v_proj(context + context_positions)),",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "self.scaling = self.head_dim**-0.5",
            "self.scaling = self.head_dim**-1.0",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "gated = nn.functional.silu(self.gate_proj(hidden_states)) * "
            "self.up_proj(hidden_states)",
            "gated = self.gate_proj(hidden_states) * "
            "nn.functional.silu(self.up_proj(hidden_states))",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "return self.down_proj(self.layer_norm(gated))",
            "return self.down_proj(gated)",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "        queries = queries + self.cross_attn(queries, self.image_layernorm(image), "
            "**kwargs)[0]",
            "        queries = queries + self.cross_attn(queries, image, **kwargs)[0]",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "return queries + self.mlp(self.mlp_layernorm(queries))",
            "return self.mlp(self.mlp_layernorm(queries))",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "torch.cat([visual_tokens, vit_eos], dim=1)",
            "torch.cat([vit_eos, visual_tokens], dim=1)",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
    ],
    ("modeling/modeling_mplug_owl2_h_reducer.py", "tests/family/test_docowl.py"): [
        (
            "blocks.permute(0, 2, 3, 4, 1).flatten(3)",
            "blocks.permute(0, 2, 3, 1, 4).flatten(3)",
            "test_the_h_reducer_alone_gives_the_originals_numbers",
        ),
        (
            "mixed = nn.functional.gelu(self.reducer_before(patches))",
            "mixed = nn.functional.relu(self.reducer_before(patches))",
            "test_the_h_reducer_alone_gives_the_originals_numbers",
        ),
        (
            "image_features[:, -(grid**2) :].transpose(1, 2)",
            "image_features[:, : grid**2].transpose(1, 2)",
            "test_the_h_reducer_alone_gives_the_originals_numbers",
        ),
    ],
    ("modeling/modeling_mplug_owl2_vision.py", "tests/test_golden.py"): [
        (
            "self.pre_layernorm(hidden_states + self._positions())",
            "self.pre_layernorm(hidden_states) + self._positions()",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "hidden_states = torch.cat([cls_token, hidden_states], dim=1)",
            "hidden_states = torch.cat([hidden_states, cls_token], dim=1)",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "self.scaling = self.head_dim**-0.5",
            "self.scaling = self.head_dim**-0.25",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), "
            "**kwargs)[0]",
            "hidden_states = hidden_states + self.self_attn(hidden_states, **kwargs)[0]",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "return hidden_states + self.mlp(self.layer_norm2(hidden_states))",
            "return hidden_states + self.mlp(self.layer_norm1(hidden_states))",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
        (
            "last_hidden_state=self.post_layernorm(hidden_states)",
            "last_hidden_state=hidden_states",
            "test_vision_and_connector_give_the_originals_numbers",
        ),
    ],
    ("modeling/modeling_mplug_owl2_vision.py", "tests/modeling/test_formulas.py"): [
        (
            'mode="bicubic", align_corners=False',
            'mode="bicubic", align_corners=True',
            "test_positions_of_patches_are_read_at_the_centres_of_a_larger_table",
        ),
    ],
    ("modeling/modeling_mplug_owl2.py", "tests/test_golden.py"): [
        (
            ".index_copy(0, positions, image_features)",
            ".index_copy(0, positions, image_features.flip(0))",
            "test_language_model_gives_the_originals_numbers",
        ),
        (
            "positions = order[order.numel() - len(image_features) :]",
            "positions = order[: len(image_features)]",
            "test_language_model_gives_the_originals_numbers",
        ),
    ],
    ("modeling/modeling_mplug_owl2.py", "tests/modeling/test_modeling_mplug_owl2.py"): [
        (
            "logits.masked_fill(reserved, RESERVED_LOGIT)",
            "logits",
            "test_reserved_ids_never_win_and_do_not_change_the_loss",
        ),
        (
            "labels = labels.masked_fill(labels.eq(self.config.image_token_id), -100)",
            "labels = labels.clone()",
            "test_labels_at_visual_positions_never_count",
        ),
    ],
    ("modeling/modeling_mplug_owl2.py", "tests/modeling/test_formulas.py"): [
        (
            "reserved = reserved | ids.ge(self.config.output_vocab_size)",
            "reserved = reserved | ids.gt(self.config.output_vocab_size)",
            "test_the_first_id_behind_the_vocabulary_is_reserved_whatever_the_placeholder_is",
        ),
        (
            'kwargs.get("shift_labels", labels[..., 1:])',
            'kwargs.get("shift_labels", labels)',
            "test_the_loss_is_the_mean_over_the_labels_that_something_predicts",
        ),
    ],
    (
        "modeling/modeling_mplug_owl2_classification.py",
        "tests/modeling/test_modeling_mplug_owl2_classification.py",
    ): [
        (
            "return (positions * is_token).argmax(-1)",
            "return is_token.int().argmax(-1)",
            "test_each_prompt_is_scored_at_its_last_token_alone_or_padded",
        ),
    ],
    ("modeling/modeling_mplug_owl2_classification.py", "tests/family/test_qscorer.py"): [
        (
            "output + hidden_states if output.shape == hidden_states.shape else output",
            "output",
            "test_scores_are_those_of_its_steps_by_hand",
        ),
    ],
    ("modeling/configuration_mplug_owl2.py", "tests/family/test_docowl.py"): [
        (
            "return self.grid_size**2 // self.kernel_width + 1",
            "return self.grid_size**2 // self.kernel_width",
            "test_info_counts_the_tokens_of_a_crop",
        ),
    ],
    ("processing/image_processing_mplug_owl2.py", "tests/family/test_docowl.py"): [
        (
            "common / (height * width + other_height * other_width - common)",
            "common / (height * width + other_height * other_width)",
            "test_grids_are_the_originals",
        ),
        (
            "scaled = np.trunc(np.float32(height / width) * widths)",
            "scaled = np.float32(height / width) * widths",
            "test_grids_are_the_originals",
        ),
        (
            "np.argmax(np.float32(100) * by_shape + by_size)",
            "np.argmax(by_shape + np.float32(100) * by_size)",
            "test_grids_are_the_originals",
        ),
        (
            "left, top = column * side, row * side",
            "left, top = row * side, column * side",
            "test_crops_and_prompts_are_the_originals",
        ),
    ],
    (
        "processing/image_processing_mplug_owl2.py",
        "tests/processing/test_image_processing_mplug_owl2.py",
    ): [
        (
            "square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))",
            "square.paste(picture, (0, 0))",
            "test_pixels_are_the_originals",
        ),
        (
            "tuple(int(channel * 255) for channel in np.broadcast_to(mean, 3))",
            "tuple(int(channel * 255) + 1 for channel in np.broadcast_to(mean, 3))",
            "test_pixels_are_the_originals",
        ),
        (
            "left, top = (picture.width - side) // 2, (picture.height - side) // 2",
            "left, top = 0, 0",
            "test_pixels_are_the_originals",
        ),
        (
            "picture = picture.resize((edge, edge), BICUBIC)",
            "picture = picture.resize((edge, edge), Image.Resampling.BILINEAR)",
            "test_pixels_are_the_originals",
        ),
        (
            "values = self.normalize(values, image_mean, image_std) if do_normalize else values",
            "values = self.normalize(values, image_std, image_std) if do_normalize else values",
            "test_pixels_are_the_originals",
        ),
    ],
    (
        "modeling/cpu_kernels_mplug_owl2.py",
        "tests/modeling/test_cpu_kernels_mplug_owl2.py",
    ): [
        (
            "key.matmul(query.transpose(2, 3)).float() * scaling",
            "key.matmul(query.transpose(2, 3)).float()",
            "test_attention_of_a_single_row_is_sdpas",
        ),
        (
            "scores.softmax(dim=2)",
            "scores.softmax(dim=1)",
            "test_attention_of_a_single_row_is_sdpas",
        ),
        (
            "torch.cat(products, dim=-1).mul_(scale)",
            "torch.cat(products, dim=-1)",
            "test_an_int8_product_is_that_of_rounded_weights",
        ),
        (
            "            output += self.bias",
            "            output -= self.bias",
            "test_an_int8_product_is_that_of_rounded_weights",
        ),
        (
            "and given.shape[:2].numel() == 1",
            "and given.shape[1] == 1",
            "test_two_rows_keep_onednn",
        ),
        (
            'wants_off = self._running["single"] > 0 and not self._running["many"]',
            'wants_off = self._running["single"] > 0',
            "test_a_prompt_in_another_thread_turns_onednn_on",
        ),
    ],
    ("analysis/attention.py", "tests/analysis/test_analysis.py"): [
        (
            "means = means / means.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float).tiny)",
            "means = means",
            "test_the_command_writes_and_prints",
        ),
        (
            "counted / counted.sum(-1, keepdim=True), means",
            "counted, means",
            "test_masses_match_a_direct_computation_with_two_pictures_and_left_padding",
        ),
    ],
}
