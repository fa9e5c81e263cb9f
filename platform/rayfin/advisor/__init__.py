"""What to train for a scenario: rules, for when no trial has anything to say."""

from rayfin.advisor.rules import RULES, Rule, recommend_text, rule_for
from rayfin.advisor.scenario import Scenario

__all__ = ["RULES", "Rule", "Scenario", "recommend_text", "rule_for"]
