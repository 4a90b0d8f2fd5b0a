{{/* The command lines of our processes, and what they must agree on with Kubernetes. Nothing else in the chart knows a flag. */}}

{{/* One setting as a flag. Helm reads every number of a values file as a float: 8000000 must not become 8e+06. */}}
{{- define "quire.flag" -}}
{{- $flag := printf "--%s" (.name | replace "_" "-") -}}
{{- if kindIs "bool" .value -}}
{{- ternary $flag (printf "--no-%s" (.name | replace "_" "-")) .value -}}
{{- else if and (kindIs "float64" .value) (eq (floor .value) .value) -}}
{{- printf "%s=%d" $flag (int64 .value) -}}
{{- else -}}
{{- printf "%s=%v" $flag .value -}}
{{- end -}}
{{- end -}}

{{/* `config:` as flags of one command. The edge's settings are the gateway's, some are both's, all others are the controller's. */}}
{{- define "quire.settingFlags" -}}
{{- $ofEdge := list "request_timeout_s" "drain_timeout_s" -}}
{{- $ofBoth := list "log_level" "start_timeout_s" -}}
{{- range $name, $value := .root.Values.config }}
{{- $isRead := or (eq $.command "serve") (has $name $ofBoth) (eq (has $name $ofEdge) (eq $.command "gateway")) }}
{{- if and $isRead (not (kindIs "invalid" $value)) }}
- {{ include "quire.flag" (dict "name" $name "value" $value) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "quire.modelFlags" -}}
{{- $model := index .Values.models 0 -}}
- --name={{ $model.name }}
{{- range $name, $value := $model.config }}
{{- if not (kindIs "invalid" $value) }}
- {{ include "quire.flag" (dict "name" $name "value" $value) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "quire.edgeFlags" -}}
- --listen=0.0.0.0:{{ .Values.gateway.port }}
- --metrics-listen=0.0.0.0:{{ .Values.gateway.metricsPort }}
{{- if gt (int64 .Values.gateway.processes) 1 }}
- --gateways={{ int64 .Values.gateway.processes }}
{{- end }}
{{- with .Values.security }}
{{- if .tokens.secretName }}
- --token-file=/etc/quire/tokens/{{ .tokens.key }}
{{- end }}
{{- if .tls.secretName }}
- --tls-cert=/etc/quire/tls/tls.crt
- --tls-key=/etc/quire/tls/tls.key
{{- if .tls.clientCertificates }}
- --tls-client-ca=/etc/quire/tls/ca.crt
{{- end }}
{{- end }}
{{- if .insecure }}
- --insecure
{{- end }}
{{- end }}
{{- end -}}

{{/* A whole cluster in one pod. */}}
{{- define "quire.serveArgs" -}}
{{- $model := index .Values.models 0 -}}
- serve
{{- with include "quire.modelPath" $model }}
- {{ . | quote }}
{{- end }}
{{ include "quire.edgeFlags" . }}
- --controller-metrics-listen=0.0.0.0:{{ .Values.controller.metricsPort }}
- --groups={{ int64 $model.groups }}
{{ include "quire.modelFlags" . }}
{{- include "quire.settingFlags" (dict "root" . "command" "serve") }}
{{- end -}}

{{/* groups comes by the environment, from a ConfigMap: to scale is not to change the pods (docs/operate.md). */}}
{{- define "quire.controllerArgs" -}}
- controller
{{- with include "quire.modelPath" (index .Values.models 0) }}
- {{ . | quote }}
{{- end }}
- --ray-address=auto
- --discovery-listen=0.0.0.0:{{ .Values.controller.discoveryPort }}
# Kubernetes puts the pod's address in.
- --scheduler-listen=$(POD_IP):{{ .Values.controller.schedulerPort }}
- --cluster-key=/etc/quire/cluster-key/cluster_key
- --controller-metrics-listen=0.0.0.0:{{ .Values.controller.metricsPort }}
{{ include "quire.modelFlags" . }}
{{- include "quire.settingFlags" (dict "root" . "command" "controller") }}
{{- end -}}

{{- define "quire.gatewayArgs" -}}
- gateway
- --discovery={{ include "quire.fullname" . }}-controller:{{ .Values.controller.discoveryPort }}
- --cluster-key=/etc/quire/cluster-key/client_key
{{ include "quire.edgeFlags" . }}
{{- include "quire.settingFlags" (dict "root" . "command" "gateway") }}
{{- end -}}

{{/* A probe of a gateway, for the health name that is given. Kubelets speak no TLS in gRPC probes, so with TLS a process asks. */}}
{{- define "quire.gatewayProbe" -}}
{{- if .root.Values.security.tls.secretName }}
exec:
  command:
    - quire
    - health
    - --address=localhost:{{ .root.Values.gateway.port }}
    - --tls-ca=/etc/quire/tls/ca.crt
    - --tls-server-name={{ include "quire.gatewayHost" .root }}
    {{- if .root.Values.security.tls.clientCertificates }}
    - --tls-cert=/etc/quire/tls/tls.crt
    - --tls-key=/etc/quire/tls/tls.key
    {{- end }}
    - --service={{ .service }}
    - --timeout=5
{{- else }}
grpc:
  port: {{ .root.Values.gateway.port }}
  service: {{ .service | quote }}
{{- end }}
{{- end -}}

{{- define "quire.gatewayHost" -}}
{{ include "quire.fullname" . }}-gateway.{{ .Release.Namespace }}.svc
{{- end -}}

{{/* Seconds that a pod gets to end: more than its preStop and its drain together, always. */}}
{{- define "quire.gracePeriodSeconds" -}}
{{- add (int64 .preStopSeconds) (int64 (ceil .drainSeconds)) 10 -}}
{{- end -}}

{{/* Of a gateway, which drains; a standalone pod then ends its scheduler and ranks too (STOP_TIMEOUT_S of a local cluster). */}}
{{- define "quire.gatewayGracePeriodSeconds" -}}
{{- $seconds := addf .Values.config.drain_timeout_s (ternary 30 0 (eq .Values.topology "standalone")) -}}
{{- include "quire.gracePeriodSeconds" (dict "preStopSeconds" .Values.gateway.preStopSeconds "drainSeconds" $seconds) -}}
{{- end -}}

{{/* What the controller takes at most to end the scheduler and all ranks (STOP_TIMEOUT_S in cluster/controller/local_cluster.py). */}}
{{- define "quire.rayGracePeriodSeconds" -}}
{{- include "quire.gracePeriodSeconds" (dict "preStopSeconds" 0 "drainSeconds" 30) -}}
{{- end -}}

{{/* A sleep before SIGTERM. Kubernetes sleeps by itself from 1.30 on; before, a process does. */}}
{{- define "quire.preStop" -}}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}
sleep:
  seconds: {{ .Values.gateway.preStopSeconds }}
{{- else }}
exec:
  command: [sleep, {{ .Values.gateway.preStopSeconds | toString | quote }}]
{{- end }}
{{- end -}}
