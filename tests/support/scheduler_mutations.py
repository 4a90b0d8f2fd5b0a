"""The rules of docs/DESIGN.md §4, §5 and §7, each with a line that keeps it, broken on purpose. The simulation must notice."""

from mutation import Mutation

MUTATIONS = (
    # -- §4, the ledger
    Mutation("a shared block is copied before it is written into", "ledger", (("self.pool.ref_count(table[place]) > 1", "False"),)),
    Mutation(
        "the last holder writes in place", "ledger", (("self.pool.ref_count(table[place]) > 1", "self.pool.ref_count(table[place]) > 0"),)
    ),
    Mutation(
        "the last token of a prompt is always computed",
        "ledger",
        (("(len(sequence.token_ids) - 1) // self.block_size]", "len(sequence.token_ids) // self.block_size]"),),
    ),
    Mutation(
        "prompt blocks are found only when they are planned",
        "ledger",
        (
            (
                "min(sequence.num_planned // self.block_size, len(sequence.block_hashes))",
                "min(len(sequence.block_table), len(sequence.block_hashes))",
            ),
        ),
    ),
    Mutation("prompt blocks can be found", "batch", (("        self._ledger.publish_planned(sequence)\n", ""),)),
    Mutation(
        "decoded blocks can be found",
        "group",
        (("        self.ledger.publish_decoded(sequence)\n        block_size", "        block_size"),),
    ),
    Mutation(
        "a decoded block is found only when its last token's keys are written",
        "ledger",
        (("num_full = (len(sequence.token_ids) - 1) // self.block_size", "num_full = len(sequence.token_ids) // self.block_size"),),
    ),
    Mutation("an evicted block is forgotten", "block_pool", (("                del self._block_of[self._hash_of.pop(block_id)]\n", ""),)),
    Mutation(
        "a freed block with a name stays findable",
        "block_pool",
        (("if block_id in self._hash_of:\n                    self._cached[block_id] = None", "if False:\n                    pass"),),
    ),
    Mutation(
        "a request for its prompt's log probabilities computes all of it",
        "ledger",
        (("if sequence.sampling.num_prompt_logprobs is not None:", "if False:"),),
    ),
    Mutation(
        "sequences of a request share its prompt's blocks when they are computed anew",
        "group",
        (("shared=leader.block_table[:num_shared], num_cached=0", "shared=[], num_cached=0"),),
    ),
    Mutation(
        "who shares what another computes waits until it is planned",
        "batch",
        (("if s.leader is None or s.leader.num_planned >= s.shared_tokens]", "]"),),
    ),
    Mutation(
        "an heir computes what its ended sibling would have",
        "group",
        (
            (
                "        if request.state is RequestState.RUNNING:\n            self._bequeath",
                "        if False:\n            self._bequeath",
            ),
        ),
    ),
    # -- S1
    Mutation(
        "S1: a step has at most max_batched_tokens",
        "batch",
        (("budget = self._max_batched_tokens - len(decoded)", "budget = self._max_batched_tokens"),),
    ),
    Mutation("S1: prompts keep their share of a step", "batch", (("PREFILL_SHARE: Final = 1 / 8", "PREFILL_SHARE: Final = 0.0"),)),
    Mutation("S1: few long prompts at once", "batch", (("MAX_LONG_PREFILLS: Final = 1", "MAX_LONG_PREFILLS: Final = 3"),)),
    Mutation("S1: a long prompt leaves room to short ones", "batch", (("max(1, budget // 2) if has_others else budget", "budget"),)),
    Mutation(
        "S1: what short prompts leave is the long one's", "batch", (("            counts[place] += more\n", "            more = 0\n"),)
    ),
    # -- S2
    Mutation("S2: the highest class goes first", "waiting_queue", (("sorted(lanes_of_model, reverse=True)", "sorted(lanes_of_model)"),)),
    Mutation("S2: a waiting request rises", "waiting_queue", (("            request.level += 1\n", ""),)),
    Mutation(
        "S2: the tenant served least goes first",
        "waiting_queue",
        (("(self._tenants[name].served, lanes.new[name][0])", "lanes.new[name][0]"),),
    ),
    Mutation(
        "S2: an idle tenant comes back at the least of the counters",
        "waiting_queue",
        (("            tenant.served = max(tenant.served, least)\n", ""),),
    ),
    Mutation(
        "S2: the earliest deadline goes first",
        "waiting_queue",
        (("(min(request.deadline_s, request.arrival_s + self._patience_s), ", "(request.arrival_s, "),),
    ),
    Mutation(
        "S2: who comes much later never overtakes",
        "waiting_queue",
        (("min(request.deadline_s, request.arrival_s + self._patience_s)", "request.deadline_s"),),
    ),
    Mutation("S2: the look-ahead is bounded", "dispatcher", (("LOOK_AHEAD: Final = 8", "LOOK_AHEAD: Final = 1000"),)),
    Mutation("S2: one that does not fit is looked past", "dispatcher", (("LOOK_AHEAD: Final = 8", "LOOK_AHEAD: Final = 0"),)),
    Mutation(
        "S2: blocks are kept for one that was passed over often", "dispatcher", (("MAX_SKIPS: Final = 8", "MAX_SKIPS: Final = 1000"),)
    ),
    Mutation(
        "S2: kept blocks are not given to others",
        "dispatcher",
        (("                closed.add(self._keeper(request, groups))\n", "                self._keeper(request, groups)\n"),),
    ),
    # -- S3
    Mutation(
        "S3: NEVER counts each sequence", "request", (("return num_shared + num_sequences * math.ceil", "return num_shared + math.ceil"),)
    ),
    Mutation(
        "S3: NEVER is answered at once", "admission", (("if not any(group.can_ever_hold(message) for group in groups):", "if False:"),)
    ),
    Mutation("S3: the queue is bounded", "waiting_queue", (("return len(self._requests) < self.max_requests and", "return"),)),
    Mutation(
        "S3: admission leaves blocks to grow",
        "group",
        (("return max(1, int(self.pool.num_blocks * WATERMARK_SHARE)) + kept", "return kept"),),
    ),
    Mutation(
        "S3: the watermark is void when nothing runs", "group", (("        if not self.running:\n            return num_blocks, 0\n", ""),)
    ),
    # -- S4
    Mutation(
        "S4: a sequence group is swapped out whole",
        "group",
        (
            (
                "        for sequence in request.sequences:\n            self.batch.leave(sequence)\n        self.batch.give_back_spare_rows(request)\n        self.ledger.swap_out",
                "        for sequence in request.sequences[:1]:\n            self.batch.leave(sequence)\n        self.batch.give_back_spare_rows(request)\n        self.ledger.swap_out",
            ),
        ),
    ),
    Mutation(
        "S4: a sequence group gets blocks whole or not at all",
        "group",
        (("while pool.num_available - max(0, num_promised - num_coming) < num_blocks:", "while pool.num_available < 1:"),),
    ),
    # -- S5
    Mutation(
        "S5: cached blocks are evicted before anybody is preempted",
        "group",
        (("while pool.num_available - max(0, num_promised - num_coming) < num_blocks:", "while pool.num_free < num_blocks:"),),
    ),
    Mutation(
        "S5: the latest arrival of the lowest class is preempted",
        "group",
        (("return max(candidates, key=_seniority, default=None)", "return min(candidates, key=_seniority, default=None)"),),
    ),
    Mutation(
        "S5: the lowest class is preempted first",
        "group",
        (("return (-request.level, request.arrival_s, request.handle)", "return (0, request.arrival_s, request.handle)"),),
    ),
    Mutation(
        "S5: nobody is swapped out ahead while there are blocks for a while",
        "group",
        (("if num_wanted <= self.pool.num_available + self.copies.num_leaving() + num_ending:", "if False:"),),
    ),
    Mutation("S5: blocks that are leaving are counted", "group", (("+ self.copies.num_leaving() + num_ending:", "+ num_ending:"),)),
    Mutation(
        "S5: nobody is swapped out ahead for itself", "group", (("+ sum(need <= last_need for need in its_needs)", "+ len(its_needs)"),)
    ),
    Mutation(
        "S5: nobody is recomputed ahead",
        "group",
        (
            ("if not self._prefers_swap(victim, holders)[0]:\n                return", "if False:\n                return"),
            ("            assert not is_requeued, victim.handle\n", ""),
        ),
    ),
    Mutation(
        "S5: only what the victim held last is counted as yielded",
        "copies",
        (("self._gpu_pool.ref_count(block_id) == count", "count > 0"),),
    ),
    Mutation(
        "S5: blocks that held rows wait for are not given to newcomers",
        "group",
        (("            self._num_promised += num_blocks\n", ""),),
    ),
    # -- S6
    Mutation("S6: the cheaper kind of preemption is chosen", "group", (("return swap_s <= recompute_s,", "return swap_s > recompute_s,"),)),
    Mutation("S6: a full swap pool means recompute", "group", (("if len(saved) > self.cpu_pool.num_available:", "if False:"),)),
    Mutation("S6: --preemption recompute", "group", (('if self.config.preemption == "recompute":', "if False:"),)),
    Mutation("S6: --preemption swap", "group", (('if self.config.preemption == "swap":', "if False:"),)),
    # -- S7
    Mutation(
        "S7: preempted requests go before new ones of their class",
        "waiting_queue",
        (
            (
                "        for level in sorted(lanes_of_model, reverse=True):\n            lanes = lanes_of_model[level]\n            for _, _, handle in lanes.preempted:\n                yield self._requests[handle]\n",
                "        for lanes in lanes_of_model.values():\n            for _, _, handle in lanes.preempted:\n                yield self._requests[handle]\n        for level in sorted(lanes_of_model, reverse=True):\n            lanes = lanes_of_model[level]\n",
            ),
        ),
    ),
    Mutation(
        "S7: nothing new goes before a preempted request that does not fit yet",
        "dispatcher",
        (("if request.is_preempted or request.num_skips >= MAX_SKIPS:", "if request.num_skips >= MAX_SKIPS:"),),
    ),
    Mutation(
        "S7: nothing of its class goes before what was swapped out",
        "group",
        (("return any(request.level <= self._swapped_level(other, now_s) for other in self.swapped.values())", "return False"),),
    ),
    Mutation(
        "S7: who was preempted comes back only when others can grow",
        "group",
        (("self._watermark() + (len(self.running) if request.is_preempted else 0)", "self._watermark()"),),
    ),
    Mutation(
        "S7: what was swapped out comes back only when others can grow",
        "group",
        (("headroom = self._watermark() + num_rows if self.running else 0", "headroom = 0"),),
    ),
    Mutation(
        "S7: swapped requests come back in order",
        "group",
        (("key=lambda r: (-self._swapped_level(r, now_s), r.arrival_s, r.handle))", "key=lambda r: -r.handle)"),),
    ),
    # -- S8
    Mutation(
        "S8: an end gives GPU blocks back",
        "ledger",
        (("        self.pool.free(sequence.block_table)\n        self.cpu_pool", "        self.cpu_pool"),),
    ),
    Mutation(
        "S8: an end gives CPU blocks back",
        "ledger",
        (("        self.cpu_pool.free(sequence.cpu_table)\n        sequence.forget_blocks()", "        sequence.forget_blocks()"),),
    ),
    Mutation(
        "S8: deadlines act",
        "scheduler",
        (("while (handle := self._deadlines.pop_due(now_s)) is not None:", "while (handle := None) is not None:"),),
    ),
    Mutation(
        "S8: a copy holds its GPU block",
        "copies",
        (("            self._gpu_pool.fork([gpu_block])\n", ""), ("            self._gpu_pool.free([copy.gpu_block])\n", "")),
    ),
    Mutation(
        "S8: a copy holds its CPU block",
        "copies",
        (("            self._cpu_pool.fork([cpu_block])\n", ""), ("            self._cpu_pool.free([copy.cpu_block])\n", "")),
    ),
    Mutation(
        "S8: a copy has ended when all ranks say so",
        "copies",
        (
            (
                "            if ranks_left:\n                continue\n            del self._ranks_left[copy_id]\n            copy = self._under_way.pop(copy_id)\n",
                "            copy = self._under_way.pop(copy_id, None)\n            if copy is None:\n                continue\n",
            ),
        ),
    ),
    # -- S9
    Mutation(
        "S9: draws are keyed by the sequence's index",
        "scheduler",
        (("msgspec.structs.replace(sampling, sequence_index=start.index)", "sampling"),),
    ),
    # -- plan-ahead
    Mutation(
        "plan-ahead: one plan is sent before the last is answered",
        "group",
        (("MAX_PLANS_OUTSTANDING: Final = 2", "MAX_PLANS_OUTSTANDING: Final = 1"),),
    ),
    Mutation(
        "plan-ahead: at most two plans are outstanding",
        "group",
        (("return self.is_ready and len(self.outstanding) < MAX_PLANS_OUTSTANDING", "return self.is_ready and len(self.outstanding) < 3"),),
    ),
    Mutation(
        "plan-ahead: ends by length are known when they are planned",
        "batch",
        (("if sequence.num_planned >= sequence.max_total - 1:", "if sequence.num_planned >= sequence.max_total:"),),
    ),
    Mutation(
        "plan-ahead: a token behind the end is dropped",
        "group",
        (
            (
                "            if sequence.ended:\n                continue\n            token_ids = sequence.token_ids",
                "            token_ids = sequence.token_ids",
            ),
        ),
    ),
    Mutation(
        "plan-ahead: who was preempted in flight waits for its token",
        "dispatcher",
        (("None if request.awaits_result else self._choose", "self._choose"),),
    ),
    Mutation(
        "plan-ahead: beams never run ahead",
        "batch",
        (("        self.stepping = [sequence for sequence in self.stepping if not sequence.num_in_flight]\n", ""),),
    ),
    # -- swapping
    Mutation(
        "a request swaps in only after its copies out have ended",
        "group",
        (("            if request.transfer is not None:\n                continue", "            if False:\n                continue"),),
    ),
    Mutation("a request goes on only after its copies in have ended", "group", (("        if not num_copied:\n", "        if True:\n"),)),
    Mutation(
        "swapped-in blocks are found only when their copies have ended",
        "ledger",
        (
            (
                "        self.pool.free(list(homes.values()))\n        request.transfer = Transfer()\n",
                "        self.pool.free(list(homes.values()))\n        for sequence in request.sequences:\n            for place in range(min(len(sequence.block_hashes), sequence.num_planned // self.block_size)):\n                self.pool.publish(sequence.block_table[place], sequence.block_hashes[place])\n        request.transfer = Transfer()\n",
            ),
        ),
    ),
    Mutation(
        "siblings get a partial block each when they come back",
        "ledger",
        (
            (
                "pairs += zip(sequence.block_table[num_full:], sequence.cpu_table[num_full:], strict=False)",
                "pairs += zip(sequence.block_table[num_full:], sequence.cpu_table[num_full:][:0], strict=False)",
            ),
        ),
    ),
    Mutation("a failed copy means recompute", "group", (("            if copy.transfer.failed:\n", "            if False:\n"),)),
    Mutation(
        "when nobody can go on before copies end, the ranks wait for them",
        "group",
        (("if not draft.computes and not self.outstanding and len(self.copies):", "if False:"),),
    ),
    # -- n > 1 and beams
    Mutation(
        "beams fork from their parent as it was before its own next token",
        "group",
        (
            (
                "children.append(self._fork(parent) if beam.parent in taken else parent)",
                "children.append(self._fork(parents[0]) if beam.parent in taken else parent)",
            ),
        ),
    ),
    Mutation(
        "beam search stops by its rule",
        "beam_search",
        (("if len(self.results) < self.params.num_beams:\n            return True\n", "if True:\n            return True\n"),),
    ),
    Mutation("beam search takes results only of the first candidates", "beam_search", (("elif place < num_beams:", "else:"),)),
    # -- §7, failures
    Mutation(
        "a lost group's requests are queued again",
        "scheduler",
        (("        self._requeue_all(group, now_s)\n        self._tell_limits()", "        self._tell_limits()"),),
    ),
    Mutation(
        "a lost group's results are not waited for",
        "scheduler",
        (("                    sequence.num_in_flight = 0\n", "                    pass\n"),),
    ),
    Mutation(
        "results of a term that is over are ignored",
        "scheduler",
        (("if group is None or result.term != group.term:", "if group is None:"),),
    ),
    Mutation(
        "acknowledgements of a term that is over are ignored",
        "scheduler",
        (("if group is None or ack.term != group.term:", "if group is None:"),),
    ),
    Mutation("a result that is late loses the group", "scheduler", (("if due_s is not None and now_s >= due_s:", "if False:"),)),
    Mutation(
        "a higher attempt supersedes a lower one", "scheduler", (('            self._end(former, "a higher attempt supersedes it")\n', ""),)
    ),
    Mutation(
        "an idle group hears a heartbeat",
        "scheduler",
        (("now_s - group.last_sent_s >= self.config.heartbeat_s:", "now_s - group.last_sent_s >= 3 * self.config.heartbeat_s:"),),
    ),
    # -- dispatch
    Mutation(
        "dispatch: the longest cached prefix",
        "dispatcher",
        (("self._with_longest_prefix(request, open_groups) if len(open_groups) > 1 else []", "[]"),),
    ),
    Mutation(
        "dispatch: else the most blocks", "dispatcher", (("        open_groups.sort(key=lambda group: -group.pool.num_available)\n", ""),)
    ),
    Mutation("a draining group takes nothing new", "dispatcher", (("and (not group.draining or self._belongs_to(request, group))", ""),)),
)
