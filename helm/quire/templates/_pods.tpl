{{/* What the pods of Ray have in common. */}}

{{- define "quire.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "quire.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Environment of every container. Folders that programs write to lie on the scratch volume, since the root is read-only. */}}
{{- define "quire.commonEnv" -}}
- name: HOME
  value: /tmp
- name: PYTHONUNBUFFERED
  value: "1"
- name: TRITON_CACHE_DIR
  value: /tmp/triton
{{- end -}}

{{- define "quire.hubEnv" -}}
{{- if include "quire.usesHub" . }}
- name: HF_HOME
  value: /models/hub
{{- with .Values.huggingFace.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with .Values.huggingFace }}
{{- if .tokenSecretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .tokenSecretName }}
      key: {{ .tokenKey }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "quire.rayEnv" -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
# Ray ends actors when memory runs full; a rank that dies so would take its whole group along.
- name: RAY_memory_monitor_refresh_ms
  value: "0"
# Ray would give scheduler and ranks a niceness of 15.
- name: RAY_worker_niceness
  value: "0"
{{- with .Values.ray.healthCheck }}
- name: RAY_health_check_initial_delay_ms
  value: {{ int64 .initialDelayMs | quote }}
- name: RAY_health_check_period_ms
  value: {{ int64 .periodMs | quote }}
- name: RAY_health_check_timeout_ms
  value: {{ int64 .timeoutMs | quote }}
- name: RAY_health_check_failure_threshold
  value: {{ int64 .failureThreshold | quote }}
{{- end }}
{{- if .Values.ray.gcsFaultTolerance.enabled }}
- name: RAY_gcs_rpc_server_reconnect_timeout_s
  value: {{ int64 .Values.ray.gcsFaultTolerance.reconnectTimeoutSeconds | quote }}
{{- end }}
{{- end -}}

{{/* How Ray knows its friends. KubeRay tells Ray's own containers when it made the token; all others, and all when it did not, we. */}}
{{- define "quire.rayTokenEnv" -}}
- name: RAY_AUTH_MODE
  value: {{ ternary "token" "disabled" .Values.ray.auth.enabled }}
{{- if .Values.ray.auth.enabled }}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ default (include "quire.fullname" .) .Values.ray.auth.secretName }}
      key: auth_token
{{- end }}
{{- end -}}

{{- define "quire.rayContainerTokenEnv" -}}
{{- if or .Values.ray.auth.secretName (not .Values.ray.auth.enabled) }}
{{- include "quire.rayTokenEnv" . }}
{{- end }}
{{- end -}}

{{/* Parameters of `ray start`; Ray takes them as texts. */}}
{{- define "quire.rayStartParams" -}}
object-store-memory: {{ int64 .Values.ray.objectStoreBytes | quote }}
{{- range $name, $value := .Values.ray.startParams }}
{{ $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end -}}

{{- define "quire.modelMounts" -}}
{{- range .Values.models }}
{{- with include "quire.claim" . }}
- name: model
  mountPath: /models/{{ . }}
  readOnly: true
{{- end }}
{{- end }}
{{- if include "quire.usesHub" . }}
- name: hub
  mountPath: /models/hub
{{- end }}
{{- end -}}

{{- define "quire.modelVolumes" -}}
{{- range .Values.models }}
{{- with include "quire.claim" . }}
- name: model
  persistentVolumeClaim:
    claimName: {{ . }}
    readOnly: true
{{- end }}
{{- end }}
{{- if include "quire.usesHub" . }}
- name: hub
  {{- if .Values.huggingFace.cacheClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.huggingFace.cacheClaim }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.huggingFace.cacheSize }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Fetches a model of the hub before anything starts, so that a wrong name or a missing token shows as what it is. */}}
{{- define "quire.fetchModel" -}}
{{- range .Values.models }}
{{- if hasPrefix "hf://" .uri }}
- name: fetch-model
  image: {{ include "quire.image" $ }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  command:
    - python
    - -P
    - -c
    - import sys; from quire.common.model_hub import fetch_model; print(fetch_model(sys.argv[1]))
    - {{ include "quire.modelPath" . | quote }}
  env:
    {{- include "quire.commonEnv" $ | nindent 4 }}
    {{- include "quire.hubEnv" $ | nindent 4 }}
  resources:
    requests: {cpu: "1", memory: 1Gi}
    limits: {memory: 2Gi}
  securityContext:
    {{- include "quire.containerSecurityContext" $ | nindent 4 }}
  volumeMounts:
    - name: scratch
      mountPath: /tmp
    {{- include "quire.modelMounts" $ | nindent 4 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Where a pod may run: nodeSelector and the like, of the part of the values that is given. */}}
{{- define "quire.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* The head's containers share Ray's session folder and shared memory: the controller joins through both. */}}
{{- define "quire.headMounts" -}}
- name: scratch
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- include "quire.modelMounts" . }}
{{- end -}}
