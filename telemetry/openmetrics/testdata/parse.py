"""Reads OpenMetrics text with the strict parser of prometheus_client."""
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families

families = list(text_string_to_metric_families(sys.stdin.read()))
print(len(families), "families")
for family in families:
    if family.name == "barevif_rx_packets":
        vif = family.samples[0].labels["vif"]
        print(family.name, int(sum(s.value for s in family.samples if s.labels["vif"] == vif)))
