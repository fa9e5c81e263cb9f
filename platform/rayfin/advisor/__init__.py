"""Recommend what to train in a scenario, from past trials or else by rules."""

from rayfin.advisor.rules import RULES, Rule, recommend_text, rule_for
from rayfin.advisor.scenario import Scenario

__all__ = ["RULES", "Rule", "Scenario", "recommend_text", "rule_for"]
