"""Targets, drafter and sequential heads as pure functions over pytrees of weights."""
