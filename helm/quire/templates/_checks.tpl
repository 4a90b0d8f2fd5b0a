{{/* What the schema cannot say: values that must fit each other. Included once, by the Deployment. */}}
{{- define "quire.check" -}}
{{- with .Values.security -}}
{{- if not (or .insecure (and .tokens.secretName .tls.secretName)) -}}
{{- fail "security: other hosts reach the gateways, so they need security.tokens.secretName and security.tls.secretName; or set security.insecure=true if the network is trusted" -}}
{{- end -}}
{{- if and (eq $.Values.topology "cluster") (not .clusterKeySecretName) -}}
{{- fail "topology is cluster, whose pods know each other by keys; make them (quire key new keys; kubectl create secret generic quire-keys --from-file keys) and set security.clusterKeySecretName=quire-keys" -}}
{{- end -}}
{{- if and .tls.clientCertificates (not .tls.secretName) -}}
{{- fail "security.tls.clientCertificates is true, but there is no TLS without security.tls.secretName; give it too" -}}
{{- end -}}
{{- end -}}
{{- range .Values.models -}}
{{- if and (hasPrefix "hf://" .uri) (not (contains "@" .uri)) (not $.Values.huggingFace.cacheClaim) -}}
{{- fail (printf "models: every pod fetches %s by itself and all must get the same files; add its commit (%s@COMMIT), or share one copy by huggingFace.cacheClaim" .uri .uri) -}}
{{- end -}}
{{- end -}}
{{- with .Values.ray.gcsFaultTolerance -}}
{{- if and .enabled (not .redisAddress) -}}
{{- fail "ray.gcsFaultTolerance.enabled is true and redisAddress is empty; give HOST:PORT of a Redis that outlives the head" -}}
{{- end -}}
{{- end -}}
{{- with .Values.gateway.autoscaling -}}
{{- if .enabled -}}
{{- if gt (int64 .minReplicas) (int64 .maxReplicas) -}}
{{- fail (printf "gateway.autoscaling: minReplicas %d is more than maxReplicas %d" (int64 .minReplicas) (int64 .maxReplicas)) -}}
{{- end -}}
{{- if not (or .targetCalls .targetWaitingRequests .targetCpuPercent) -}}
{{- fail "gateway.autoscaling is enabled and has no target; set targetCalls, targetWaitingRequests or targetCpuPercent" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $ports := list (int64 .Values.gateway.port) (int64 .Values.gateway.metricsPort) -}}
{{- if eq (index $ports 0) (index $ports 1) -}}
{{- fail (printf "gateway.port and gateway.metricsPort are both %d; give them different ports" (index $ports 0)) -}}
{{- end -}}
{{- $steps := add (int64 .Values.controller.schedulerPort) 1 -}}
{{- $ports = dict "controller.discoveryPort" .Values.controller.discoveryPort "controller.metricsPort" .Values.controller.metricsPort "controller.schedulerPort" .Values.controller.schedulerPort "the port behind controller.schedulerPort" $steps -}}
{{- range $name, $port := $ports -}}
{{- range $other, $taken := $ports -}}
{{- if and (lt $name $other) (eq (int64 $port) (int64 $taken)) -}}
{{- fail (printf "%s and %s are both %d; give them different ports" $name $other (int64 $port)) -}}
{{- end -}}
{{- end -}}
{{- if and (ge (int64 $port) 10002) (le (int64 $port) 19999) -}}
{{- fail (printf "%s is %d, but Ray gives ports 10002 to 19999 to its workers; choose one outside" $name (int64 $port)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
